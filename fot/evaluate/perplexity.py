"""Perplexity on held-out documents by memory length (FoT, section 4).

  python -m fot.evaluate perplexity --workdir=runs/tiny
  python -m fot.evaluate perplexity --workdir=runs/tiny --config.evaluate.memory=0,4096 --config.evaluate.readers=dense

Reads every document from its first token to its last, window by window, and stores the keys and values of each
window in a memory of fixed length. The config is the one stored with the newest checkpoint in the workdir, unless
--config names another. Prints tables, and writes perplexity.json and perplexity.png.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import bucket, loading, model, objective, sharding
from fot import config as config_lib
from fot import memory as memories
from fot import trained as trained_model
from fot.attention import Tokens
from fot.config import ExperimentConfig, ModelConfig
from fot.data import corpus as corpora
from fot.data import rows, tasks
from fot.data.corpus import Corpus
from fot.data.rows import Batch
from fot.errors import UserError
from fot.evaluate import perplexity_report as report
from fot.evaluate.perplexity_report import Bin, Column, Results
from fot.memory import Memory
from fot.metrics import Progress
from fot.readers import reader as readers
from fot.readers.reader import Reader

SHOW_SECONDS = 1.0  # between two looks at the running sums: each waits for the devices


class Mode(NamedTuple):
    """What becomes of a row's memory when the row goes on to another document.

    Attributes:
      forget: (document before [B], document now [B]) -> [B] bool, rows whose memory is emptied.
      fills: (longest document, most tokens of a row) -> entries that a row has use for, in tokens.
    """

    forget: Callable[[np.ndarray, np.ndarray], np.ndarray]
    fills: Callable[[int, int], int]


MODES: dict[str, Mode] = {
    "single_doc": Mode(lambda before, now: before != now, lambda document, row: document),
    "multi_doc": Mode(lambda before, now: np.zeros(now.shape, bool), lambda document, row: row),
}


class Totals(NamedTuple):
    """Sums by bin of position [P]: negative log-likelihood in nats, and targets."""

    nll: jax.Array
    tokens: jax.Array


class _Run(NamedTuple):
    """One pass over the documents; columns that differ only in slots that stay empty share it.

    Attributes:
      mode: entry of `MODES`; that of a pass without memory changes nothing.
      reader: None without memory.
      capacity: slots of a row, in tokens.
    """

    mode: str
    reader: Reader | None
    capacity: int


class _Score(NamedTuple):
    """What a pass gave: sums on the host, and its time without compilation."""

    totals: Totals
    seconds: float


def evaluate(
    params: model.Params, config: ExperimentConfig, corpus: Corpus, mesh: Mesh, log: Callable[[str], None]
) -> Results:
    """Measures perplexity for every mode, reader and memory length of `config.evaluate`, and without memory.

    Every column reads the same targets in the same windows. Single_doc results don't depend on the order of the
    documents nor on `batch_size`; in multi_doc mode a row's memory holds what this row has read before.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: model, `data.context` and `evaluate`; without `model.memory_layers`, only "no memory" is measured.
      corpus: the documents.
      mesh: rows are split over data and fsdp, heads over tensor.
      log: receives a line for every column.

    Raises:
      ConfigError: `evaluate.batch_size` can't be split over the mesh.
    """
    trained_model.check_rows(config, mesh)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    wanted = _wanted(config, corpus)
    scores: dict[_Run, _Score] = {}
    columns: list[Column] = []
    windows = rows.evaluation_batch_count(corpus, config.data.context, config.evaluate)
    with jax.set_mesh(mesh), Progress(windows * len(set(wanted.values())), 0, sys.stderr) as progress:
        for (mode, reader, length), run in wanted.items():
            if run not in scores:
                show = functools.partial(_show, progress, windows * len(scores))
                scores[run] = _pass(params, config, corpus, mesh, run, show)
            columns.append(_column(mode, reader, length, scores[run], columns, config))
            log(_line(columns[-1]))
    return Results(config.data.context, tuple(columns))


def _wanted(config: ExperimentConfig, corpus: Corpus) -> dict[tuple[str, str, int], _Run]:
    """Returns {(mode, reader, memory length): the pass that gives it}, the one without memory first."""
    evaluate, context = config.evaluate, config.data.context
    inputs = corpus.lengths[: evaluate.max_documents or None] - 1
    longest = int(min(inputs.max(), evaluate.max_tokens or inputs.max()))
    row = rows.evaluation_batch_count(corpus, context, evaluate) * context
    wanted = {(report.NO_MEMORY, report.NO_MEMORY, 0): _Run("multi_doc", None, 0)}
    if not config.model.memory_layers:
        return wanted
    for mode in evaluate.modes:
        for name in evaluate.readers:
            reader = readers.of_config(name, config)
            for length in evaluate.memory:
                if length > 0:
                    run = _Run(mode, reader, min(length, MODES[mode].fills(longest, row)))
                    wanted[mode, name, length] = run
    return wanted


def _column(
    mode: str, reader: str, length: int, score: _Score, before: list[Column], config: ExperimentConfig
) -> Column:
    ends = config.evaluate.position_bins
    tokens, sums = score.totals.tokens.tolist(), score.totals.nll.tolist()
    count = sum(tokens)
    nll = sum(sums) / count
    reference = before[0].nll if before else nll
    bins = zip((0, *ends), (*ends, None), tokens, sums, strict=True)
    return Column(
        mode=mode,
        reader=reader,
        memory=length,
        tokens=count,
        nll=nll,
        change=100 * (report.perplexity(nll - reference) - 1),
        seconds=score.seconds,
        positions=tuple(Bin(start, stop, n, total / n) for start, stop, n, total in bins if n > 0),
    )


def _line(column: Column) -> str:
    way = "no memory" if column.memory == 0 else f"{column.mode}, {column.reader}, memory {column.memory:,}"
    return (
        f"{way}: perplexity {column.perplexity:.3f} ({column.change:+.1f}%), {column.tokens:,} targets in "
        f"{column.seconds:.1f} s"
    )


def _show(progress: Progress, before: int, windows: int, totals: Totals, seconds: float) -> None:
    """Shows how far a pass is; waits for the devices."""
    nll, tokens = (float(each.sum()) for each in jax.device_get(totals))
    progress.update(before + windows, nll / max(tokens, 1), tokens / seconds)


def _pass(
    params: model.Params,
    config: ExperimentConfig,
    corpus: Corpus,
    mesh: Mesh,
    run: _Run,
    show: Callable[[int, Totals, float], None],
) -> _Score:
    """Reads all documents once."""
    read = _program(config.model, config.evaluate.position_bins, run.reader, mesh)
    store = None if run.reader is None else loading.store_of(run.reader, mesh)
    overflow = memories.OVERFLOWS[config.evaluate.overflow]
    forget = MODES[run.mode].forget
    documents = np.full(config.evaluate.batch_size, -1, np.int32)
    written = np.zeros(config.evaluate.batch_size, np.int64)

    def step(
        memory: Memory | None, totals: Totals, batch: Batch, forgotten: np.ndarray
    ) -> tuple[Memory | None, Totals]:
        if memory is not None:
            count = (batch.documents >= 0).sum(1)
            written[forgotten] = 0
            overflow(written, count, run.capacity)
            written[:] += count
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        if memory is None:
            return None, read(params, batch, memory, totals)[0]
        if forgotten.any():
            memory = store.clear(memory, forgotten)
        totals, keys, values = read(params, batch, memory, totals)
        return store.write(memory, keys, values, batch.documents), totals

    memory = None
    if store is not None:
        memory = store.empty(config.model, config.evaluate.batch_size, run.capacity, config.model.compute_dtype)
        memory = store.refresh(store.build(memory))
    every = max(1, config.evaluate.refresh // config.data.context)
    bins = len(config.evaluate.position_bins) + 1
    totals = jax.device_put(Totals(np.zeros(bins, np.float32), np.zeros(bins, np.int32)), sharding.replicated(mesh))
    # A window without tokens changes nothing, and compiles everything.
    memory, totals = step(memory, totals, _blank(config), documents < 0)
    jax.block_until_ready((memory, totals))
    began = shown = time.perf_counter()
    count = 0
    for count, batch in enumerate(rows.evaluation_batches(corpus, config.data.context, config.evaluate), start=1):
        memory, totals = step(memory, totals, batch, forget(documents, batch.documents[:, 0]))
        documents = batch.documents[:, 0]
        if store is not None and count % every == 0:
            # Centroids anew at the first, second, fourth, ... time: as often as the memory has doubled.
            times = count // every
            memory = (store.build if times & (times - 1) == 0 else store.refresh)(memory)
        if time.perf_counter() - shown > SHOW_SECONDS:
            show(count, totals, time.perf_counter() - began)
            shown = time.perf_counter()
    jax.block_until_ready(totals)
    seconds = time.perf_counter() - began
    show(count, totals, seconds)
    return _Score(jax.device_get(totals), seconds)


@functools.lru_cache(maxsize=64)  # the passes of all modes and models of one shape compile once
def _program(config: ModelConfig, ends: tuple[int, ...], reader: Reader | None, mesh: Mesh) -> Callable:
    """Returns (params, batch, memory, totals) -> totals with the batch, and its keys and values [L, B, T, G, H].

    Reading and writing are two programs: in one, XLA would copy the memory at every window, as what is read there
    can't be overwritten in place. The totals are given up.
    """
    window = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, None, sharding.MESH_AXES["kv_heads"], None))
    return jax.jit(
        functools.partial(_read, config=config, ends=ends, reader=reader),
        out_shardings=(sharding.replicated(mesh), window, window),
        donate_argnums=3,
    )


def _same(memory: Memory | None) -> Memory | None:
    return memory


def _read(
    params: model.Params,
    batch: Batch,
    memory: Memory | None,
    totals: Totals,
    *,
    config: ModelConfig,
    ends: tuple[int, ...],
    reader: Reader | None,
) -> tuple[Totals, jax.Array, jax.Array]:
    tokens = Tokens(batch.documents, batch.positions)
    output = model.apply(params, batch.tokens, tokens, config, memory=memory, reader=reader)
    nll_BT, _ = objective.token_nll(params, output.hidden, batch.targets, config)
    bin_BT = jnp.searchsorted(jnp.array(ends), batch.positions, side="right")
    counted_PBT = (bin_BT == jnp.arange(len(ends) + 1)[:, None, None]) & (batch.weights > 0)
    nll_P = jnp.where(counted_PBT, nll_BT, 0.0).sum((1, 2))
    totals = Totals(totals.nll + nll_P, totals.tokens + counted_PBT.sum((1, 2), dtype=jnp.int32))
    return totals, output.keys, output.values


def _blank(config: ExperimentConfig) -> Batch:
    shape = (config.evaluate.batch_size, config.data.context)
    zeros = np.zeros(shape, np.int32)
    return Batch(zeros, zeros, np.zeros(shape, np.float32), np.full(shape, -1, np.int32), zeros)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, with its checkpoints/; the newest checkpoint is evaluated.
      split: documents to read: held_out or train.
      output: folder that receives perplexity.json and perplexity.png; empty is the workdir.
    """

    workdir: str
    split: str = "held_out"
    output: str = ""


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    tasks.check_split(flags.split)
    generated = set(config_lib.GENERATED_TASKS).intersection(config.data.task)
    if generated:
        [task] = generated
        raise UserError(f"documents of data.task={task} have no end: run python -m fot.evaluate {task} instead")
    workdir = bucket.path(flags.workdir)
    output = bucket.path(flags.output or flags.workdir)
    trained = trained_model.load(flags.workdir, config)
    corpus = corpora.load(config, flags.split).corpus
    print(
        f"step {trained.step}: {len(corpus)} documents, {int(corpus.lengths.sum()):,} tokens ({flags.split})",
        flush=True,
    )
    results = evaluate(trained.params, config, corpus, trained.mesh, lambda line: print(line, flush=True))
    about = {"workdir": str(workdir), "step": trained.step, "split": flags.split, "config": config_lib.to_dict(config)}
    path = report.save(results, about, output)
    report.plot({workdir.name or str(workdir): results}, output / report.PLOT_FILE)
    print(f"\n{report.table(results)}\n\n{report.position_table(results)}\n")
    print(f"written to {path} and {output / report.PLOT_FILE}")
