"""Fills a memory from long texts, at the cost of its keys and values alone (FoT, section 3.1)."""

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import lean, model, sharding
from fot import memory as memories
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ModelConfig
from fot.errors import UserError
from fot.layers import block_of
from fot.memory import Index, Lists, Memory
from fot.metrics import Progress
from fot.readers import host, host_lists, index
from fot.readers import table as readers
from fot.readers.reader import Reader

_HEADS = sharding.MESH_AXES["kv_heads"]
SHOW_SECONDS = 1.0  # between two looks at how far it is

Show = Callable[[int, float], None]  # (windows read so far, tokens/s)


class Loading(NamedTuple):
    """How a memory is filled; fixed for a run.

    Attributes:
      reader: how all memory layers but the last read what is there already.
      windows: windows of a row that are read by one call of the program if the model has one memory layer; with
        several, a window's entries depend on those written before it. Changes no result.
      overflow: an entry of `fot.memory.OVERFLOWS`.
    """

    reader: Reader
    windows: int
    overflow: str


class Store(NamedTuple):
    """What makes and changes memories on a mesh; the memory that is given is given up.

    Attributes:
      empty: (config, rows, capacity, dtype) -> a memory without entries for the model's memory layers.
      write: see `fot.memory.write`.
      clear: see `fot.memory.clear`.
      build, refresh: memory -> memory with what its reader looks up there, made anew or kept up (`fot.readers.index`).
    """

    empty: Callable[[ModelConfig, int, int, str], Memory]
    write: Callable[..., Memory]
    clear: Callable[..., Memory]
    build: Callable[[Memory], Memory] = lambda memory: memory
    refresh: Callable[[Memory], Memory] = lambda memory: memory


def memory_sharding(mesh: Mesh, slots: str | None = None) -> Memory:
    """Returns where a memory lives: rows over data and fsdp, key/value heads over tensor, slots over that axis."""
    place = functools.partial(NamedSharding, mesh)
    return jax.tree.map(place, _specs(slots), is_leaf=lambda each: isinstance(each, PartitionSpec))


def _specs(slots: str | None) -> Memory:
    pairs = PartitionSpec(None, sharding.ROWS, _HEADS, slots, None)
    return Memory(pairs, pairs, PartitionSpec(sharding.ROWS, slots), PartitionSpec(sharding.ROWS))


@functools.lru_cache(maxsize=64)
def store(mesh: Mesh) -> Store:
    """Returns the programs of memories that live as `memory_format` says; each compiles once for a shape."""
    return _device_store(mesh, memory_format(mesh))


def memory_format(mesh: Mesh, slots: str | None = None) -> Memory:
    """Returns `memory_sharding` with how entries lie there: a slot's numbers side by side, as kernels read them.

    Left alone, the TPU's compiler lays out heads that aren't of 128 numbers otherwise, and copies a memory to read it.
    """
    place = memory_sharding(mesh, slots)
    pairs = Format(memories.row_major(5), place.keys)
    return place._replace(keys=pairs, values=pairs)


def _device_store(mesh: Mesh, place: Memory, slots: str | None = None) -> Store:
    """Slots are split over that mesh axis, None is none."""
    shards, specs = mesh.shape[slots] if slots else 1, _specs(slots)
    entries = PartitionSpec(None, sharding.ROWS, None, _HEADS, None)

    def write_part(part: Memory, keys: jax.Array, values: jax.Array, documents_BT: jax.Array) -> Memory:
        first = jax.lax.axis_index(slots) * part.capacity if slots else 0
        return memories.write_part(part, keys, values, documents_BT, first, part.capacity * shards)

    # By hand: XLA would bring together what it writes to places that it does not know.
    by_hand = jax.shard_map(
        write_part, mesh=mesh, in_specs=(specs, entries, entries, PartitionSpec(sharding.ROWS)), out_specs=specs
    )

    def write(memory: Memory, *window: jax.Array) -> Memory:
        return by_hand(memory._replace(index=None), *window)._replace(index=memory.index)

    return Store(
        _sized(jax.jit(memories.empty, static_argnums=(0, 1, 2, 3, 4, 5), out_shardings=place)),
        write=jax.jit(write, out_shardings=place, donate_argnums=0),
        clear=jax.jit(memories.clear, out_shardings=place, donate_argnums=0),
    )


@functools.lru_cache(maxsize=64)
def _sharded_store(mesh: Mesh) -> Store:
    """Slots are split over the mesh axis `sharding.SLOTS`, and capacities rounded up to a multiple of its devices."""
    shards = mesh.shape[sharding.SLOTS]
    made = _device_store(mesh, memory_format(mesh, sharding.SLOTS), sharding.SLOTS)
    return made._replace(
        empty=lambda config, rows, capacity, dtype: made.empty(config, rows, -(-capacity // shards) * shards, dtype)
    )


@functools.lru_cache(maxsize=64)
def _listed_store(mesh: Mesh, list_size: int) -> Store:
    """Lists lie where the rows and heads of their memory do."""
    heads = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, _HEADS))
    lists = Index(Lists(*[heads] * len(Lists._fields)), NamedSharding(mesh, PartitionSpec(sharding.ROWS)))
    place = memory_format(mesh)._replace(index=lists)
    build, refresh = (
        jax.jit(functools.partial(make, list_size=list_size), out_shardings=place, donate_argnums=0)
        for make in (index.build, index.refresh)
    )
    made = _device_store(mesh, place)
    return made._replace(
        empty=lambda *shape: build(store(mesh).empty(*shape)),
        build=build,
        refresh=refresh,
    )


def _host_lists_store(mesh: Mesh, list_size: int) -> Store:
    build, refresh = (functools.partial(make, list_size=list_size) for make in (host_lists.build, host_lists.refresh))
    return _host_store(mesh)._replace(build=build, refresh=refresh)


def _host_store(mesh: Mesh) -> Store:
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        raise UserError("a memory on the host needs all devices in one process: choose a reader that reads on devices")
    return Store(_sized(host.empty), host.write, host.clear)


def _sized(make: Callable[..., Memory]) -> Callable[[ModelConfig, int, int, str], Memory]:
    def empty(config: ModelConfig, rows: int, capacity: int, dtype: str) -> Memory:
        return make(len(config.memory_layers), rows, capacity, config.kv_heads, config.head_dim, jnp.dtype(dtype))

    return empty


STORES: dict[str, Callable[[Mesh, Reader], Store]] = {
    "device": lambda mesh, reader: store(mesh),
    "lists": lambda mesh, reader: _listed_store(mesh, reader.list_size),
    "sharded": lambda mesh, reader: _sharded_store(mesh),
    "host": lambda mesh, reader: _host_store(mesh),
    "host_lists": lambda mesh, reader: _host_lists_store(mesh, reader.list_size),
}


def store_of(reader: Reader, mesh: Mesh) -> Store:
    """Returns the store of what that reader reads.

    Raises:
      UserError: the mesh can't have it.
    """
    return STORES[readers.place(reader.name)](mesh, reader)


@contextlib.contextmanager
def progress(windows: int) -> Iterator[Show]:
    """Gives what shows on stderr how many of all windows are read, and tokens/s."""
    with Progress(windows, 0, sys.stderr, "window") as bar:
        yield lambda done, speed: bar.show(done, f"{speed:,.0f} tokens/s")


def load(
    params: model.Params,
    config: ModelConfig,
    memory: Memory,
    windows: Iterable[Batch],
    loading: Loading,
    mesh: Mesh,
    show: Show,
) -> Memory:
    """Appends the entries of windows of text to a memory, which is given up.

    The keys and values are those of `model.apply` on each window, with a memory of the windows before it. However
    many windows there are, the same programs run, and two chunks of them are in memory.

    Args:
      params: as `model.init` gives them, placed on the mesh; or of `incremental.prepare`, which takes less memory.
      config: the model.
      memory: the memory to append to, of `store_of(loading.reader, mesh)`.
      windows: numpy arrays [B, T], all of one shape, a row's windows in the order of its text; tokens, documents and
        positions are read.
      loading: how.
      mesh: where params and memory are.
      show: is told now and then how far it is.

    Returns:
      The memory with the entries.

    Raises:
      UserError: `loading.overflow` is "refuse" and there is no room; nothing that was stored before is overwritten.
    """
    alone = len(config.memory_layers) <= 1  # no window's entries depend on another window
    programs = _program if isinstance(params["layers"], dict) else _layered
    read = programs(config, None if alone else loading.reader, mesh)
    write, overflow = store_of(loading.reader, mesh).write, memories.OVERFLOWS[loading.overflow]
    written_B = _on_host(memory.written)
    before = None
    done = tokens = 0
    began = shown = time.perf_counter()
    with jax.set_mesh(mesh):
        for chunk, count in _chunks(windows, loading.windows if alone else 1):
            count_B = (chunk.documents >= 0).sum((1, 2))
            overflow(written_B, count_B, memory.capacity)
            written_B = written_B + count_B
            placed = jax.device_put(chunk, NamedSharding(mesh, PartitionSpec(sharding.ROWS, None, None)))
            entries = read(params, placed, None if alone else memory)
            memory = write(memory, *entries)
            jax.block_until_ready(before)
            if time.perf_counter() - shown > SHOW_SECONDS:
                shown = time.perf_counter()
                show(done, tokens / (shown - began))
            done, tokens, before = done + count, tokens + int(count_B.sum()), entries
    jax.block_until_ready(memory)
    show(done, tokens / (time.perf_counter() - began))
    return memory


class _Chunk(NamedTuple):
    """Consecutive windows of every row, [B, W, T]."""

    tokens: np.ndarray
    documents: np.ndarray
    positions: np.ndarray


def _chunks(windows: Iterable[Batch], size: int) -> Iterator[tuple[_Chunk, int]]:
    """Yields chunks of `size` windows and how many of them are real; the last chunk is filled up with padding."""
    windows = iter(windows)
    while some := list(itertools.islice(windows, size)):
        missing = ((0, 0), (0, size - len(some)), (0, 0))
        fields = (np.stack([getattr(window, name) for window in some], 1) for name in _Chunk._fields)
        filled = (np.pad(x, missing, constant_values=fill) for x, fill in zip(fields, (0, -1, 0), strict=True))
        yield _Chunk(*filled), len(some)


@functools.lru_cache(maxsize=64)  # every load of one model and reader runs the same program
def _program(config: ModelConfig, reader: Reader | None, mesh: Mesh) -> Callable:
    """Returns (params, chunk, memory) -> what `write` takes: keys and values [L, B, W·T, G, H], documents [B, W·T].

    Reading and writing are two programs: in one, XLA would copy a memory that is read there.
    """
    pairs = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, None, _HEADS, None))
    return jax.jit(
        functools.partial(_read, config=config, reader=reader),
        out_shardings=(pairs, pairs, sharding.batch_sharding(mesh)),
        compiler_options=lean.compiler_options(mesh),
    )


def _read(
    params: model.Params, chunk: _Chunk, memory: Memory | None, *, config: ModelConfig, reader: Reader | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def entries_of(window: _Chunk) -> model.Entries:
        tokens = Tokens(window.documents, window.positions)
        return model.memory_entries(params, window.tokens, tokens, config, memory=memory, reader=reader)

    # Window by window: side by side, XLA would round otherwise than it does for a window alone.
    return _flat(jax.lax.map(entries_of, _by_window(chunk)), chunk.documents)


@functools.lru_cache(maxsize=64)
def _layered(config: ModelConfig, reader: Reader | None, mesh: Mesh) -> Callable:
    """Returns what `_program` does, for layers apart: each is a call of its own, and those of a kind one program.

    So one layer is compiled, kept and given room for what it computes, not all of them.
    """
    stream = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS))
    pairs = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, None, _HEADS))
    joined = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS, None, _HEADS, None))
    rows = sharding.batch_sharding(mesh)
    program = functools.partial(jax.jit, compiler_options=lean.compiler_options(mesh))

    @functools.partial(program, out_shardings=(stream, stream))
    def begin(embedding: jax.Array, chunk: _Chunk) -> tuple[jax.Array, Tokens]:
        chunk = _by_window(chunk)
        return embedding[chunk.tokens], Tokens(chunk.documents, chunk.positions)

    @functools.partial(program, out_shardings=stream, donate_argnames="x_WBTD")
    def local(layer: model.Params, x_WBTD: jax.Array, tokens: Tokens) -> jax.Array:
        return jax.lax.map(lambda window: _local(layer, *window, config), (x_WBTD, tokens))

    @functools.partial(program, out_shardings=(stream, pairs), donate_argnames="x_WBTD", static_argnames="index")
    def remote(
        layer: model.Params, x_WBTD: jax.Array, tokens: Tokens, memory: Memory, index: int
    ) -> tuple[jax.Array, model.Entries]:
        def one(window: tuple[jax.Array, Tokens]) -> tuple[jax.Array, model.Entries]:
            x_BTD, tokens = window
            source = model.Source(tokens, memory=memory, reader=reader)
            x_BTD, keys, values, _ = model.memory_layer(layer, x_BTD, config=config, source=source, index=index)
            return x_BTD, model.Entries(keys, values)

        return jax.lax.map(one, (x_WBTD, tokens))

    @functools.partial(program, out_shardings=(joined, joined, rows))
    def last(layer: model.Params, x_WBTD: jax.Array, before: list[model.Entries], documents_BWT: jax.Array) -> tuple:
        entries = model.Entries(*jax.lax.map(block_of(config, layer).project_entries, x_WBTD))
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers, 1), *before, entries)
        return _flat(stacked, documents_BWT)

    def read(params: model.Params, chunk: _Chunk, memory: Memory | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_WBTD, tokens = begin(params["embedding"], chunk)
        before: list[model.Entries] = []
        *below, top = params["layers"][: config.memory_layers[-1] + 1]
        for number, layer in enumerate(below):
            if number in config.memory_layers:
                x_WBTD, entries = remote(layer, x_WBTD, tokens, memory, index=len(before))
                before.append(entries)
            else:
                x_WBTD = local(layer, x_WBTD, tokens)
        return last(top, x_WBTD, before, chunk.documents)

    return read


def _local(layer: model.Params, x_BTD: jax.Array, tokens: Tokens, config: ModelConfig) -> jax.Array:
    """`model.local_layer` of a window; of its first half alone if the second is padding, as where a text ends."""

    def whole(x_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        return model.local_layer(layer, x_BTD, tokens, config)

    def first_half(x_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        x, tokens = jax.tree.map(lambda x: x[:, :half], (x_BTD, tokens))
        return jnp.concatenate([whole(x, tokens), x_BTD[:, half:]], axis=1)

    half = -(-x_BTD.shape[1] // 2)
    padded = (tokens.documents[:, half:] < 0).all()
    return jax.lax.cond(padded, first_half, whole, x_BTD, tokens)


def _by_window(chunk: _Chunk) -> _Chunk:
    """[B, W, T] → [W, B, T]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), chunk)


def _flat(entries: model.Entries, documents_BWT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `write` takes, of entries [W, L, B, T, G, H]."""
    B, W, T = documents_BWT.shape
    keys, values = (x.transpose(1, 2, 0, 3, 4, 5).reshape(-1, B, W * T, *x.shape[4:]) for x in entries)
    return keys, values, documents_BWT.reshape(B, W * T)


def _on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)
