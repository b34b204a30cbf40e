"""Retrieval inspector: which memory tokens a token retrieves, and what they are worth to it (FoT, section 3.1).

  python -m fot.evaluate retrieval --workdir=runs/demo/focused
  python -m fot.evaluate retrieval --workdir=runs/demo/focused --document=json/decoder.py --positions=1200,1201

Reads one document window by window into a memory, as the evaluation perplexity does, with the longest memory of
evaluate.memory and the first reader of evaluate.readers. For every token that is asked for, in every memory layer and
head: the memory tokens of the largest inner products with it, their kNN score (the scaled inner product), and their
focus score (the attention weight in the joint softmax with the local context). Without --positions: the tokens whose
loss falls most through the memory.

The config is the one stored with the newest checkpoint in the workdir, unless --config names another. Prints the
result as text, and writes retrieval.html, a page that needs nothing else.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import attention, bucket, loading, model, objective, sharding
from fot import trained as trained_model
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ExperimentConfig, ModelConfig
from fot.data import corpus as corpora
from fot.data import rows, tasks
from fot.data.corpus import Corpus
from fot.errors import ConfigError, DataError, UserError
from fot.evaluate import retrieval_report as report
from fot.evaluate.retrieval_report import Entry, Head, Query
from fot.memory import Memory
from fot.model import Reads
from fot.readers import table as readers
from fot.readers.reader import Reader, of_config


class Losses(NamedTuple):
    """Negative log-likelihood of each token's successor [tokens], in nats: with the memory, and without any."""

    memory: np.ndarray
    without: np.ndarray


class _Window(NamedTuple):
    """What reading a window of T tokens gave: losses of the first row [T], and what the memory layers made of it."""

    losses: Losses
    keys: jax.Array
    values: jax.Array
    reads: tuple[Reads, ...]


class _Found(NamedTuple):
    """What one token retrieved, the best first: [L, N, K] scores, slots and focus, and the memory's share [L, N]."""

    scores: jax.Array
    slots: jax.Array
    focus: jax.Array
    share: jax.Array


def inspect(
    params: model.Params, config: ExperimentConfig, document: np.ndarray, positions: Sequence[int], mesh: Mesh
) -> tuple[Query, ...]:
    """Returns what the tokens at `positions` of a document retrieve.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: model, `data.context` and `evaluate`.
      document: its tokens, bos and eos included.
      positions: tokens to look at, each with a successor; none: `evaluate.inspected` of those whose loss falls most
        through the memory, the most first.
      mesh: heads are split over tensor; the document is read by the first row.

    Raises:
      ConfigError: the model has no memory layer, or the config no memory or reader.
      DataError: a position isn't in the document, or none is named and the document ends with its first window.
    """
    _check(config)
    inputs = len(document) - 1
    outside = [position for position in positions if not 0 <= position < inputs]
    if outside:
        raise DataError(f"position {outside[0]} is outside of the document: choose from 0 to {inputs - 1}")
    params = jax.device_put(params, sharding.shardings(params, mesh))
    if not positions:
        stop = min(config.evaluate.max_tokens or inputs, inputs)
        losses = [window.losses for window, *_ in _windows(params, config, document, stop, mesh)]
        positions = _most_helped(losses, config, stop)
    return _queries(params, config, document, positions, mesh)


def _check(config: ExperimentConfig) -> None:
    if not config.model.memory_layers:
        raise ConfigError("model.memory_layers is empty: this model has no layer that could read a memory")
    if not max(config.evaluate.memory):
        raise ConfigError("evaluate.memory names no length above 0: there is nothing to retrieve from")
    if not config.evaluate.readers:
        raise ConfigError("evaluate.readers is empty: name the reader to retrieve with")


def _most_helped(losses: list[Losses], config: ExperimentConfig, stop: int) -> list[int]:
    """Returns the positions whose loss falls most; the first window has no memory yet."""
    if stop <= config.data.context:
        raise DataError(
            f"the document's {stop} tokens fit into one window (data.context={config.data.context}), before which "
            "nothing is in memory: name a longer document, or positions"
        )
    gain = np.concatenate([each.without - each.memory for each in losses])[config.data.context : stop]
    order = np.argsort(-gain, kind="stable")[: config.evaluate.inspected]
    return [int(position) + config.data.context for position in order]


def _queries(
    params: model.Params, config: ExperimentConfig, document: np.ndarray, positions: Sequence[int], mesh: Mesh
) -> tuple[Query, ...]:
    """Reads up to the last position, and looks at each as its window comes by."""
    find = _programs(config.model, _reader(config), mesh).find
    count = min(config.evaluate.retrieved, config.evaluate.neighbours)
    context, queries = config.data.context, {}
    for first, (window, memory) in enumerate(_windows(params, config, document, max(positions) + 1, mesh)):
        for position in sorted(set(positions)):
            place = position - first * context
            if 0 <= place < context:
                found = jax.device_get(find(window.reads, memory, place, min(count, memory.capacity)))
                written = int(np.asarray(memory.written)[0])
                losses = Losses(*(float(each[place]) for each in window.losses))
                queries[position] = _query(position, losses, found, written, memory.capacity, config.model)
    return tuple(queries[position] for position in positions)


def _query(position: int, losses: Losses, found: _Found, written: int, capacity: int, config: ModelConfig) -> Query:
    # A slot holds the latest token that was written to it; the memory began with the document's first.
    tokens_LNK = written - 1 - (written - 1 - found.slots) % capacity
    heads = tuple(
        Head(
            layer=layer,
            head=head,
            share=float(found.share[index, head]),
            entries=tuple(
                Entry(int(token), float(score), float(focus))
                for token, score, focus in zip(
                    tokens_LNK[index, head], found.scores[index, head], found.focus[index, head], strict=True
                )
                if score > -np.inf
            ),
        )
        for index, layer in enumerate(config.memory_layers)
        for head in range(config.heads)
    )
    return Query(position, losses.memory, losses.without, heads)


def _reader(config: ExperimentConfig) -> Reader:
    return of_config(config.evaluate.readers[0], config)


def _windows(
    params: model.Params, config: ExperimentConfig, document: np.ndarray, stop: int, mesh: Mesh
) -> Iterator[tuple[_Window, Memory]]:
    """Yields each window of the document's first `stop` tokens, and the memory as it was before; use it at once."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    evaluate = dataclasses.replace(config.evaluate, batch_size=shards, max_documents=1, max_tokens=stop)
    config = dataclasses.replace(config, evaluate=evaluate)
    read, store = _programs(config.model, _reader(config), mesh).read, loading.store(mesh)
    capacity = min(max(evaluate.memory), len(document))
    memory = store.empty(config.model, shards, capacity, config.model.compute_dtype)
    for batch in rows.evaluation_batches(corpora.from_arrays([document]), config.data.context, evaluate):
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        window = read(params, batch, memory)
        window = window._replace(losses=jax.device_get(window.losses))
        yield window, memory
        memory = store.write(memory, window.keys, window.values, batch.documents)


class _Programs(NamedTuple):
    """What is compiled.

    Attributes:
      read: (params, batch, memory) -> _Window.
      find: (reads, memory, place in the window, how many) -> _Found.
    """

    read: Callable
    find: Callable


@functools.lru_cache(maxsize=16)
def _programs(config: ModelConfig, reader: Reader, mesh: Mesh) -> _Programs:
    heads = sharding.MESH_AXES["kv_heads"]
    window = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, None, heads, None))
    return _Programs(
        read=jax.jit(
            functools.partial(_read, config=config, reader=reader),
            out_shardings=_Window(sharding.replicated(mesh), window, window, sharding.replicated(mesh)),
        ),
        find=jax.jit(
            functools.partial(_find, reader=reader), static_argnums=3, out_shardings=sharding.replicated(mesh)
        ),
    )


def _read(params: model.Params, batch: Batch, memory: Memory, *, config: ModelConfig, reader: Reader) -> _Window:
    tokens = Tokens(batch.documents, batch.positions)
    output = model.apply(params, batch.tokens, tokens, config, memory=memory, reader=reader)
    alone = model.apply(params, batch.tokens, tokens, config)
    losses = (objective.token_nll(params, each.hidden, batch.targets, config)[0][0] for each in (output, alone))
    return _Window(Losses(*losses), output.keys, output.values, output.reads)


def _find(reads: tuple[Reads, ...], memory: Memory, place: jax.Array, count: int, *, reader: Reader) -> _Found:
    """Finds what the first row's token at `place` retrieves."""
    found = []
    for index, each in enumerate(reads):
        q_BTNH, share_BTN = (jax.lax.dynamic_slice_in_dim(x[:1], place, 1, axis=1) for x in each)
        slots = jax.tree.map(lambda x: x[:1], memory.slots(index)._replace(stack=None))
        q_BGRTH = attention.split_heads(q_BTNH, slots.keys.shape[1])
        s_BGRTM = attention.logits(q_BGRTH, slots.keys, (slots.documents >= 0)[:, None])
        scores_NK, slots_NK = jax.lax.top_k(s_BGRTM.reshape(q_BTNH.shape[2], -1), count)
        lse_N1 = readers.read(q_BTNH, jnp.zeros((1, 1), jnp.int32), slots, reader).lse[0, 0, :, None]
        focus_NK = share_BTN[0, 0, :, None] * jnp.exp(scores_NK - attention.finite(lse_N1))
        found.append(_Found(scores_NK, slots_NK, focus_NK, share_BTN[0, 0]))
    return jax.tree.map(lambda *layers: jnp.stack(layers), *found)


def find_document(corpus: Corpus, wanted: str, split: str) -> int:
    """Returns the number of the document with that name or, where none has it, number; of "", the longest document.

    Raises:
      UserError: there is none.
    """
    if not wanted:
        return int(corpus.lengths.argmax())
    names = [corpus.name(number) for number in range(len(corpus))]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(corpus):
        return int(wanted)
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)
    raise UserError(
        f"--document={wanted} is no document of the {split} split; the nearest name is {close[0]!r}, and numbers go "
        f"from 0 to {len(corpus) - 1}"
    )


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, with its checkpoints/; the newest checkpoint is evaluated.
      document: name of the document to read, or its number in the split; empty is the longest.
      positions: tokens to look at, counted from 0, the document's bos; none are those that the memory helps most.
      split: documents to choose from: held_out or train.
      output: folder that receives retrieval.html; empty is the workdir.
    """

    workdir: str
    document: str = ""
    positions: tuple[int, ...] = ()
    split: str = "held_out"
    output: str = ""


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    tasks.check_split(flags.split)
    if not all(isinstance(position, int) for position in flags.positions):
        raise UserError(f"--positions={flags.positions} must be numbers of tokens, such as --positions=120,121")
    _check(config)
    trained = trained_model.load(flags.workdir, config)
    tokenizer, corpus = corpora.load(config, flags.split)
    number = find_document(corpus, flags.document, flags.split)
    document, name = corpus.document(number), corpus.name(number)
    try:
        queries = inspect(trained.params, config, document, flags.positions, trained.mesh)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    page = report.Page(
        title=f"{flags.workdir}, step {trained.step}: {name}",
        reader=config.evaluate.readers[0],
        memory=min(max(config.evaluate.memory), len(document)),
        document=document,
        queries=queries,
        surroundings=config.evaluate.surroundings,
    )
    path = report.save(page, tokenizer, bucket.path(flags.output or flags.workdir))
    print(f"{report.as_text(page, tokenizer)}\n\nwritten to {path}")
