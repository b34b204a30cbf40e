"""Distraction: attention to the own previous context among those of other documents (FoT, section 3.3).

  python -m fot.evaluate distraction --workdir=runs/distraction/d8
  python -m fot.evaluate distraction --workdir=runs/distraction/d8 --against=runs/distraction/d1,runs/distraction/plain

The memory layers of a window see, beside the window, d contexts: the one just before it, and d - 1 previous contexts of
other documents. The positive attention mass r_d is the attention to the first over that to all d, from the exact
softmax, averaged over queries. A model that can't tell its own document from others has r_d = 1/d.

The config, --split and --output are as in the evaluation perplexity; every model of --against is read with its own
config, but for the groups evaluate and mesh. Prints tables, and writes distraction.json and distraction.png.
`configs/distraction.py` says how to train the models of the paper's figure.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import bucket, model, sharding
from fot import config as config_lib
from fot import trained as trained_model
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ExperimentConfig, ModelConfig
from fot.data import corpus as corpora
from fot.data import tasks
from fot.data.corpus import Corpus
from fot.errors import ConfigError, DataError
from fot.evaluate import distraction_report as report
from fot.evaluate.distraction_report import Masses
from fot.memory import Memory, Slots
from fot.readers import table as readers
from fot.readers.reader import Reader, of_config


class Pair(NamedTuple):
    """Two consecutive windows of one document: a previous context, and the queries that follow it.

    Attributes:
      document: its number in the corpus.
      start: position of the previous context's first token; the queries' window begins a context later.
    """

    document: int
    start: int


class Contexts(NamedTuple):
    """What the memory layers keep of the previous contexts of P pairs.

    Attributes:
      keys, values: [L, P, T, G, H].
      documents: [P] int32.
    """

    keys: jax.Array
    values: jax.Array
    documents: jax.Array


def choose(corpus: Corpus, context: int, most: int, windows: int, seed: int) -> list[Pair]:
    """Returns pairs of windows such that each finds `most` - 1 pairs of other documents among the rest.

    They are `windows` at least, unless the documents hold no more. Every document gives a pair before any gives
    another: where documents are fewer than contexts, some contexts are of one document. The windows of a document are
    drawn at random.

    Raises:
      DataError: the documents are too few or too short.
    """
    generator = np.random.default_rng(seed)
    counts = corpus.lengths // (2 * context)
    places = {number: generator.permutation(count) for number, count in enumerate(counts) if count > 0}
    pairs, largest = [], 0
    for turn in range(int(counts.max())):
        for number, order in places.items():
            if turn >= len(order):
                continue
            pairs.append(Pair(number, int(order[turn]) * 2 * context))
            largest = turn + 1
            if len(pairs) >= windows and len(pairs) - largest >= most - 1:
                return pairs
    if not pairs or len(pairs) - largest < most - 1:
        raise DataError(
            f"{most} contexts want {most - 1} windows of other documents, and there are {len(pairs) - largest}: lower "
            "config.evaluate.contexts, or read --split=train"
        )
    return pairs


def others(pairs: list[Pair], most: int) -> np.ndarray:
    """Returns, for each pair, the `most` contexts that it sees: its own, then the next ones of other documents.

    Returns:
      [P, most] int32, indices of pairs.
    """

    def seen(row: int) -> list[int]:
        following = [(row + step) % len(pairs) for step in range(1, len(pairs))]
        negatives = [other for other in following if pairs[other].document != pairs[row].document]
        return [row, *negatives[: most - 1]]

    return np.array([seen(row) for row in range(len(pairs))], np.int32)


def evaluate(params: model.Params, config: ExperimentConfig, corpus: Corpus, mesh: Mesh) -> Masses:
    """Measures r_d for every d of `config.evaluate.contexts`, memory layer and head.

    The contexts in view are what a memory holds: previous contexts, each of which was read alone. Side by side are
    `evaluate.batch_size` windows, each with keys and values of the largest d; logits are formed `evaluate.block` slots
    at a time.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: model, `data.context`, `data.seed` and `evaluate`.
      corpus: the documents.
      mesh: rows are split over data and fsdp, heads over tensor.

    Raises:
      ConfigError: the model has no memory layer, or `evaluate.batch_size` can't be split over the mesh.
      DataError: see `choose`.
    """
    trained_model.check_rows(config, mesh)
    if not config.model.memory_layers:
        raise ConfigError("model.memory_layers is empty: this model has no layer that could see other contexts")
    params = jax.device_put(params, sharding.shardings(params, mesh))
    counts, context = config.evaluate.contexts, config.data.context
    pairs = choose(corpus, context, max(counts), config.evaluate.query_windows, config.data.seed)
    table_PC = others(pairs, max(counts))
    contexts = _read(params, config, corpus, pairs, mesh)
    measure = _programs(config.model, of_config("dense", config), mesh).measure
    sums = {count: 0.0 for count in counts}
    for rows in _batches(pairs, config.evaluate.batch_size):
        batch = jax.device_put(_windows(corpus, pairs, rows, context, context), sharding.batch_sharding(mesh))
        for count in counts:
            sums[count] += np.asarray(measure(params, batch, contexts, table_PC[np.maximum(rows, 0)], count), float)
    queries = len(pairs) * context
    return Masses(
        context=context,
        documents=len({pair.document for pair in pairs}),
        queries=queries,
        contexts=counts,
        layers=config.model.memory_layers,
        masses=tuple(tuple(map(tuple, (sums[count] / queries).tolist())) for count in counts),
    )


def _batches(pairs: list[Pair], size: int) -> Iterator[np.ndarray]:
    """Yields indices of pairs [size]; -1 where the last batch has none left."""
    for first in range(0, len(pairs), size):
        rows = np.arange(first, first + size)
        yield np.where(rows < len(pairs), rows, -1)


def _windows(corpus: Corpus, pairs: list[Pair], rows: np.ndarray, after: int, context: int) -> Batch:
    """Returns the windows that begin `after` tokens after the pairs do; nothing is a target."""
    tokens, documents, positions = (np.zeros((len(rows), context), np.int32) for _ in range(3))
    documents[:] = -1
    for place, row in enumerate(rows):
        if row >= 0:
            number, start = pairs[row].document, pairs[row].start + after
            tokens[place] = corpus.read(number, start, start + context)
            documents[place], positions[place] = number, start + np.arange(context)
    return Batch(tokens, np.zeros_like(tokens), np.zeros(tokens.shape, np.float32), documents, positions)


def _read(params: model.Params, config: ExperimentConfig, corpus: Corpus, pairs: list[Pair], mesh: Mesh) -> Contexts:
    """Reads the previous context of every pair, each alone."""
    read, place = _programs(config.model, of_config("dense", config), mesh).read, sharding.batch_sharding(mesh)
    parts = [
        read(params, jax.device_put(_windows(corpus, pairs, rows, 0, config.data.context), place))
        for rows in _batches(pairs, config.evaluate.batch_size)
    ]
    keys, values = (jnp.concatenate(each, axis=1)[:, : len(pairs)] for each in zip(*parts, strict=True))
    return Contexts(keys, values, np.array([pair.document for pair in pairs], np.int32))


class _Programs(NamedTuple):
    """What is compiled.

    Attributes:
      read: (params, batch) -> keys and values [L, B, T, G, H].
      measure: (params, batch, contexts, rows_BC, count) -> see `_measure`.
    """

    read: Callable
    measure: Callable


@functools.lru_cache(maxsize=16)  # models of one shape compile once
def _programs(config: ModelConfig, everything: Reader, mesh: Mesh) -> _Programs:
    window = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, None, sharding.MESH_AXES["kv_heads"], None))

    def read(params: model.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output = model.apply(params, batch.tokens, Tokens(batch.documents, batch.positions), config)
        return output.keys, output.values

    measure = functools.partial(_measure, config=config, everything=everything)
    return _Programs(
        read=jax.jit(read, out_shardings=(window, window)),
        measure=jax.jit(measure, out_shardings=sharding.replicated(mesh)),
    )


def _measure(
    params: model.Params,
    batch: Batch,
    contexts: Contexts,
    rows_BC: jax.Array,
    count: jax.Array,
    *,
    config: ModelConfig,
    everything: Reader,
) -> jax.Array:
    """Returns the sum over the batch's queries of r_d with d = `count` contexts in view, float32 [L, N]."""
    memory = _view(contexts, rows_BC, count)
    tokens = Tokens(batch.documents, batch.positions)
    output = model.apply(params, batch.tokens, tokens, config, memory=memory, reader=everything)
    size = batch.tokens.shape[1]
    sums = []
    for index, reads in enumerate(output.reads):
        slots = memory.slots(index)
        own = Slots(slots.keys[:, :, :size], slots.values[:, :, :size], slots.documents[:, :size])
        lse_all, lse_own = (
            readers.read(reads.queries, tokens.documents, each, everything).lse for each in (slots, own)
        )
        mass_BTN = jnp.where(tokens.documents[..., None] >= 0, jnp.exp(lse_own - lse_all), 0.0)
        sums.append(mass_BTN.sum((0, 1)))
    return jnp.stack(sums)


def _view(contexts: Contexts, rows_BC: jax.Array, count: jax.Array) -> Memory:
    """Returns a memory that holds, in each row, the first `count` of the contexts that `rows_BC` names."""
    B, C = rows_BC.shape
    L, _, T, G, H = contexts.keys.shape
    held_BC = jnp.where(jnp.arange(C) < count, contexts.documents[rows_BC], -1)

    def gather(x_LPTGH):
        return x_LPTGH[:, rows_BC].transpose(0, 1, 4, 2, 3, 5).reshape(L, B, G, C * T, H)

    return Memory(
        gather(contexts.keys), gather(contexts.values), jnp.repeat(held_BC, T, axis=1), jnp.full(B, count * T)
    )


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, with its checkpoints/; the newest checkpoint is evaluated.
      against: workdirs of other runs, whose curves go into the same tables and plot.
      split: documents to read: held_out or train.
      output: folder that receives distraction.json and distraction.png; empty is the workdir.
    """

    workdir: str
    against: tuple[str, ...] = ()
    split: str = "held_out"
    output: str = ""


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    tasks.check_split(flags.split)
    configs = {flags.workdir: config}
    for workdir in flags.against:
        stored = trained_model.load_config(workdir)
        configs[workdir] = dataclasses.replace(stored, evaluate=config.evaluate, mesh=config.mesh)
    labels = report.labels(configs)
    results, about, keys = {}, {}, {}
    for workdir, each in configs.items():
        label = labels[workdir]
        trained = trained_model.load(workdir, each)
        corpus = corpora.load(each, flags.split).corpus
        try:
            results[label] = evaluate(trained.params, each, corpus, trained.mesh)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{workdir}: {error}") from None
        keys[label] = corpus.key, each.data.context
        about[label] = {"workdir": workdir, "step": trained.step, "config": config_lib.to_dict(each)}
        print(f"{label}: step {trained.step}, {report.summary(results[label])} ({flags.split})", flush=True)
    if len(set(keys.values())) > 1:
        print("note: these models read other documents, or contexts of other lengths, than each other")
    output = bucket.path(flags.output or flags.workdir)
    path = report.save(results, about, flags.split, output)
    report.plot(results, output / report.PLOT_FILE)
    print(f"\n{report.table(results)}\n\n{report.head_table(results)}\n")
    print(f"written to {path} and {output / report.PLOT_FILE}")
