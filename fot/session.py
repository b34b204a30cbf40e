"""Texts that are read and go on: a local cache and a memory for each row, and what moves entries from one to the other.

Inference of FoT, section 3.1, as the released LongLLaMA code does it, for each row as if it were alone:
- Of a text that begins, the last `last_context_length` tokens enter the cache. What is before them is cut into windows
  of `window` tokens, each of which enters the memory whole, read with places from 0 and the memory of those before it.
- Tokens that follow are read after the cache. If they would make it longer than `window`, all it holds moves to the
  memory first, and places begin at 0 again. Layers without memory forget it.
- A text that follows a cache is read in pieces: `window` tokens at a time, and at last `last_context_length`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import cache as caches
from fot import incremental, lean, loading, model, sharding
from fot.attention import Tokens
from fot.batch import Batch
from fot.cache import Cache
from fot.config import ExperimentConfig, ModelConfig
from fot.layers import Params, rms_norm
from fot.loading import Loading, Show
from fot.memory import Memory
from fot.readers.reader import Reader, of_config

PADDING = -1  # in a text: no token, but a place when the text is cut into windows, as in padded batches for PyTorch
_LEAST = 16  # tokens of the smallest piece that is not a single token; others are powers of two, to compile rarely
_HEADS = sharding.MESH_AXES["kv_heads"]


class Setup(NamedTuple):
    """What is fixed for a session.

    Attributes:
      model: the model.
      window: tokens of a window, and entries that the cache holds before they move.
      last_context_length: tokens at the end of a text that stay in the cache.
      memory_dtype: dtype of the memory.
      memory_block: capacities of the memory are multiples of so many entries.
      windows: see `fot.loading.Loading`.
      reader: how the memory is read.
      mesh: where everything lives; rows over data and fsdp.
    """

    model: ModelConfig
    window: int
    last_context_length: int
    memory_dtype: str
    memory_block: int
    windows: int
    reader: Reader
    mesh: Mesh

    @property
    def cache_capacity(self) -> int:
        """Entries that the cache has room for."""
        return max(self.window, self.last_context_length)


def setup_of(config: ExperimentConfig, mesh: Mesh) -> Setup:
    """Returns what a config says, on that mesh."""
    settings = config.generate
    return Setup(
        model=config.model,
        window=config.data.context,
        last_context_length=settings.last_context_length,
        memory_dtype=config.model.compute_dtype if settings.memory_dtype == "compute" else settings.memory_dtype,
        memory_block=settings.memory_block,
        windows=settings.windows,
        reader=of_config(settings.reader, config),
        mesh=mesh,
    )


class State(NamedTuple):
    """B texts as far as they are read. What changes it gives it up.

    Attributes:
      cache: of all layers; None as long as nothing is in it, so that no text is read into memory beside an empty one.
      memory: of the memory layers; None as long as nothing had to be stored.
      length: [B] numpy, entries in the cache, as `cache.length`.
      written: [B] numpy, entries in the memory.
    """

    cache: Cache | None
    memory: Any
    length: np.ndarray
    written: np.ndarray


def empty(setup: Setup, rows: int) -> State:
    """Returns texts of which nothing is read; `rows` must be a multiple of the devices that rows are split over."""
    return State(None, None, np.zeros(rows, np.int64), np.zeros(rows, np.int64))


def entries_of(setup: Setup, length: int, new_tokens: int) -> int:
    """Returns how many entries of a text of so many tokens, and as many more, may have to be in memory together.

    Of the new ones no more than a block is counted: the memory grows when it has to.
    """
    last = min(length, setup.last_context_length)
    moved = last + new_tokens if last + new_tokens > setup.window else 0
    return length - last + min(moved, setup.memory_block)


def reserve(setup: Setup, state: State, entries: int) -> State:
    """Returns the texts with room for so many entries of a row in memory; nothing changes if there is."""
    if not setup.model.memory_layers or entries <= (0 if state.memory is None else state.memory.capacity):
        return state
    return state._replace(memory=_copied(setup, state.memory, len(state.length), entries))


def remember(setup: Setup, state: State, memory: Memory) -> State:
    """Returns texts, of which nothing is read, with a memory from elsewhere before them: a row for each, or for all.

    Args:
      setup: the session.
      state: of `empty`.
      memory: arrays on the host, as `fot.memory_file.load` gives them.
    """
    rows = len(state.length)
    wide = memory._replace(
        keys=np.broadcast_to(memory.keys, (len(memory.keys), rows, *memory.keys.shape[2:])),
        values=np.broadcast_to(memory.values, (len(memory.values), rows, *memory.values.shape[2:])),
        documents=np.broadcast_to(memory.documents, (rows, memory.capacity)),
    )
    written = (wide.documents >= 0).sum(1)
    return state._replace(memory=_copied(setup, wide, rows, int(written.max())), written=written)


def _copied(setup: Setup, memory: Any, rows: int, entries: int) -> Any:
    """Returns a memory with room for so many entries, and all that another one holds."""
    store = loading.store_of(setup.reader, setup.mesh)
    capacity = -(-entries // setup.memory_block) * setup.memory_block
    with jax.set_mesh(setup.mesh):
        new = store.empty(setup.model, rows, capacity, setup.memory_dtype)
        if memory is not None:
            held = getattr(memory, "arrays", memory)  # of a memory on the host
            documents = jax.device_put(np.asarray(held.documents), sharding.batch_sharding(setup.mesh))
            new = store.write(new, held.keys.swapaxes(2, 3), held.values.swapaxes(2, 3), documents)
        return store.build(new)


def read(
    params: Params, setup: Setup, state: State, texts: Sequence[np.ndarray], show: Show
) -> tuple[State, jax.Array]:
    """Reads the texts that come next.

    Args:
      params: of `incremental.prepare`.
      setup: the session.
      state: what was read before; it is given up.
      texts: token ids of each row, of any length, and `PADDING`; none is for a row that is left alone.
      show: is told how many windows are in memory, and tokens/s, see `fot.loading.load`.

    Returns:
      The state, and float32 logits [B, V] after the last token of each text.
    """
    fresh_B = state.length == 0
    prefix_B = np.array([max(len(text) - setup.last_context_length, 0) for text in texts])
    state = _load(params, setup, state, texts, np.where(fresh_B, prefix_B, 0), show)
    after_B = np.where(fresh_B, 0, prefix_B)
    pieces = [_pieces(setup, text, prefix) for text, prefix in zip(texts, after_B, strict=True)]
    # All rows end with the last step, so that what is returned is of one step.
    longest = max(map(len, pieces))
    pieces = [[[]] * (longest - len(row)) + row for row in pieces]
    for step in zip(*pieces, strict=True):
        state, logits = advance(params, setup, state, step)
    return state, logits


def _pieces(setup: Setup, text: np.ndarray, prefix: int) -> list[np.ndarray]:
    """Returns the pieces in which a text is read after a cache; the last one always, if only it."""
    first = [text[begin : min(begin + setup.window, prefix)] for begin in range(0, prefix, setup.window)]
    return [_tokens(piece) for piece in (*first, text[max(len(text) - setup.last_context_length, 0) :])]


def _tokens(text: np.ndarray) -> np.ndarray:
    """Returns a text without its padding."""
    return text[text != PADDING]


def _token_counts(texts: Sequence[np.ndarray], length_B: np.ndarray) -> np.ndarray:
    """Returns how many of the first `length_B` places of each text are tokens."""
    return np.array([len(_tokens(text[:length])) for text, length in zip(texts, length_B, strict=True)])


def advance(params: Params, setup: Setup, state: State, tokens: Sequence[Sequence[int]]) -> tuple[State, jax.Array]:
    """Reads one piece of each row after its cache; none is for a row that is left alone.

    Returns:
      The state, and float32 logits [B, V] after the last token of each piece.
    """
    programs = _programs(setup.model, setup.reader, setup.mesh)
    return _step(params, setup, state, tokens, programs.last)


def _step(
    params: Params, setup: Setup, state: State, tokens: Sequence[Sequence[int]], unembed: Callable
) -> tuple[State, jax.Array]:
    extend = incremental.extension(setup.model, setup.reader, setup.mesh)
    count_B = np.array([len(each) for each in tokens], np.int32)
    width = _width(int(count_B.max()), setup.cache_capacity)
    padded_BT = np.zeros((len(tokens), width), np.int32)
    for row, each in zip(padded_BT, tokens, strict=True):
        row[: len(each)] = each
    with jax.set_mesh(setup.mesh):
        state = _make_room(setup, state, count_B)
        hidden, cache = extend(params, padded_BT, count_B, state.cache, state.memory, setup.cache_capacity)
        ends = {name: part for name, part in params.items() if name != "layers"}
        return state._replace(cache=cache, length=state.length + count_B), unembed(ends, hidden, count_B)


def _width(count: int, most: int) -> int:
    if count <= 1:
        return 1
    return min(max(1 << (count - 1).bit_length(), _LEAST), max(most, count))


def _make_room(setup: Setup, state: State, count_B: np.ndarray) -> State:
    """Moves the cache of rows that so many tokens would make too long."""
    moved_B = (state.length > 0) & (count_B > 0) & (state.length + count_B > setup.window)
    if not moved_B.any():
        return state
    programs = _programs(setup.model, setup.reader, setup.mesh)
    length_B = np.where(moved_B, state.length, 0)
    written_B = state.written
    if setup.model.memory_layers:
        written_B = written_B + length_B
        state = reserve(setup, state, int(written_B.max()))
        store = loading.store_of(setup.reader, setup.mesh)
        documents_BS = np.where(np.arange(setup.cache_capacity) < length_B[:, None], 0, -1).astype(np.int32)
        placed = jax.device_put(documents_BS, sharding.batch_sharding(setup.mesh))
        memory = store.refresh(store.write(state.memory, *programs.stored(state.cache), placed))
        state = state._replace(memory=memory)
    cache = programs.forget(state.cache, moved_B)
    return State(cache, state.memory, np.where(moved_B, 0, state.length), written_B)


def _load(
    params: Params, setup: Setup, state: State, texts: Sequence[np.ndarray], prefix_B: np.ndarray, show: Show
) -> State:
    """Reads the first `prefix_B` tokens of each text into memory."""
    if not setup.model.memory_layers or not prefix_B.any():
        return state
    state = reserve(setup, state, int((state.written + prefix_B).max()))
    how = Loading(setup.reader, setup.windows, "refuse")
    windows = windows_of(texts, prefix_B, setup.window)
    memory = loading.load(params, setup.model, state.memory, windows, how, setup.mesh, show)
    with jax.set_mesh(setup.mesh):
        memory = loading.store_of(setup.reader, setup.mesh).build(memory)
    return state._replace(memory=memory, written=state.written + _token_counts(texts, prefix_B))


def windows_of(texts: Sequence[np.ndarray], length_B: np.ndarray, window: int) -> Iterator[Batch]:
    """Yields the windows of the first `length_B` tokens of each text; a row's last one may be shorter."""
    place_T = np.arange(window, dtype=np.int32)
    for first in range(0, int(length_B.max()), window):
        tokens = np.full((len(texts), window), PADDING, np.int32)
        for row, text, length in zip(tokens, texts, length_B, strict=True):
            part = text[first : max(min(first + window, length), first)]
            row[: len(part)] = part
        documents = np.where(tokens != PADDING, 0, -1).astype(np.int32)
        yield Batch(np.maximum(tokens, 0), None, None, documents, np.broadcast_to(first + place_T, tokens.shape))


def all_logits(
    params: Params, setup: Setup, state: State, texts: Sequence[np.ndarray]
) -> tuple[State, list[np.ndarray]]:
    """Reads texts that begin, as `read` does, through the whole model.

    Returns:
      The state, and float32 logits [tokens, V] at all tokens of each text, those that are `PADDING` left out.
    """
    programs = _programs(setup.model, setup.reader, setup.mesh)
    length_B = np.array([len(text) for text in texts])
    prefix_B = np.maximum(length_B - setup.last_context_length, 0)
    state = reserve(setup, state, int((state.written + prefix_B).max()))
    store = loading.store_of(setup.reader, setup.mesh)
    parts: list[list[np.ndarray]] = [[] for _ in texts]

    def keep(logits_BTV: jax.Array, real_BT: np.ndarray) -> None:
        for part, logits_TV, real_T in zip(parts, np.asarray(logits_BTV), real_BT, strict=True):
            part.append(logits_TV[real_T])

    for batch in windows_of(texts, prefix_B, setup.window) if prefix_B.any() else ():
        with jax.set_mesh(setup.mesh):
            placed = jax.device_put(batch.documents, sharding.batch_sharding(setup.mesh))
            logits, entries = programs.window(params, batch.tokens, placed, state.memory)
            keep(logits, batch.documents >= 0)
            if setup.model.memory_layers:
                state = state._replace(memory=store.refresh(store.write(state.memory, *entries, placed)))
    state = state._replace(written=state.written + (_token_counts(texts, prefix_B) if setup.model.memory_layers else 0))
    last = [_tokens(text[prefix:]) for text, prefix in zip(texts, prefix_B, strict=True)]
    state, logits = _step(params, setup, state, last, programs.each)
    keep(logits, np.arange(logits.shape[1]) < np.array([len(row) for row in last])[:, None])
    return state, [np.concatenate(part) for part in parts]


class _Programs(NamedTuple):
    """Compiled once for a shape.

    Attributes:
      last: (params without layers, stream [B, T, D], counts [B]) -> logits [B, V] after each row's last token.
      each: the same with logits [B, T, V].
      window: (params, tokens [B, T], documents [B, T], memory) -> logits [B, T, V], entries for a memory.
      forget: `fot.cache.forget`; the cache is given up.
      stored: cache -> keys and values of the memory layers as a memory takes them, [L, B, S, G, H].
    """

    last: Callable
    each: Callable
    window: Callable
    forget: Callable
    stored: Callable


@functools.lru_cache(maxsize=64)
def _programs(config: ModelConfig, reader: Reader, mesh: Mesh) -> _Programs:
    def place(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    held, rows = place(sharding.ROWS, _HEADS), place(sharding.ROWS)
    cache = Cache(held, held, held, rows)
    pairs = place(None, sharding.ROWS, None, _HEADS)
    everywhere = sharding.replicated(mesh)
    passes = functools.partial(jax.jit, compiler_options=lean.compiler_options(mesh))

    def hidden(ends: Params, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, ends["final_norm"], config.norm_epsilon)

    def last(ends: Params, x_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
        index_B = jnp.maximum(count_B - 1, 0)
        hidden_BD = jnp.take_along_axis(hidden(ends, x_BTD), index_B[:, None, None], 1)[:, 0]
        return model.unembed(ends, hidden_BD, config)

    def each(ends: Params, x_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
        return model.unembed(ends, hidden(ends, x_BTD), config)

    def window(params: Params, tokens_BT: jax.Array, documents_BT: jax.Array, memory: Any) -> tuple:
        place_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        where = Tokens(documents_BT, place_BT)
        found = model.apply(params, tokens_BT, where, config, memory=memory, reader=reader)
        return model.unembed(params, found.hidden, config), (found.keys, found.values)

    def stored(cache: Cache) -> tuple[jax.Array, jax.Array]:
        values = (cache.values[layer] for layer in config.memory_layers)
        return tuple(jnp.stack([x.swapaxes(1, 2) for x in held]) for held in (cache.stored, values))

    return _Programs(
        last=passes(last, out_shardings=everywhere),
        each=passes(each, out_shardings=everywhere),
        window=passes(window, out_shardings=(everywhere, (pairs, pairs))),
        forget=jax.jit(caches.forget, out_shardings=cache, donate_argnums=0),
        stored=jax.jit(stored, out_shardings=(pairs, pairs)),
    )
