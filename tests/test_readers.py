"""Properties of every reader: what it makes of a memory, alone and inside the model."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import attention, memory, model, sharding
from fot import config as config_lib
from fot.attention import Partial, Tokens
from fot.config import READER_NAMES, ModelConfig
from fot.memory import Slots
from fot.readers import host, table
from fot.readers.reader import Reader
from fot.readers.table import READERS

LAYERS, B, T, N, G, H = 2, 3, 5, 4, 2, 4
BLOCKS = [3, 7, 100]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def close(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


EXACT = ["knn", "host", "host_lists", "sharded_knn"]  # that read the k nearest, all of them
M = 17
DOCUMENTS = np.random.default_rng(1).integers(-1, 3, (B, M)).astype(np.int32)
DOCUMENTS[2] = -1  # a row that remembers nothing
QUERIES = np.array([[0, 0, 0, 1, 1], [2, 2, 2, 2, 5], [0, 0, 1, 1, 1]], np.int32)


def slots() -> Slots:
    return Slots(draw(B, G, M, H, seed=1), draw(B, G, M, H, seed=2), jnp.asarray(DOCUMENTS))


def reader(name: str, neighbours: int = M, block: int = 7, multi_doc: bool = True) -> Reader:
    return Reader(name, neighbours, block, multi_doc, recall_target=0.9, list_size=4, probes=2)


def on_device(entries: memory.Memory) -> memory.Memory:
    return entries


def on_host(entries: memory.Memory) -> host.HostMemory:
    """The slots that are filled come first there, as in a memory that is written slot by slot."""
    order = np.argsort(np.asarray(entries.documents) < 0, 1, kind="stable")
    keys, values = (np.take_along_axis(np.asarray(x), order[None, :, None, :, None], 3) for x in entries[:2])
    documents = np.take_along_axis(np.asarray(entries.documents), order, 1)
    HELD.append(host.hold(memory.Memory(keys, values, documents, (documents >= 0).sum(1, dtype=np.int32))))
    return HELD[-1]


HELD = []  # a memory on the host is there as long as somebody holds it


def spread(entries: memory.Memory) -> memory.Memory:
    """Over the devices of `MESH`; slots that are missing for that are empty ones."""
    missing = -entries.capacity % MESH.shape[sharding.SLOTS]
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0))) for x in entries[:2])
    documents = jnp.pad(entries.documents, ((0, 0), (0, missing)), constant_values=-1)
    return memory.Memory(keys, values, documents, entries.written)


MESH = sharding.make_mesh(config_lib.MeshConfig(fsdp=1, sequence=8), jax.devices())
PLACES = {"device": on_device, "lists": on_device, "host": on_host, "host_lists": on_host, "sharded": spread}
WITH_GRADIENT = [name for name in READERS if PLACES[table.place(name)] != on_host]


@pytest.fixture(autouse=True)
def mesh(request):
    name = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else ""
    with jax.set_mesh(MESH) if table.place(name) == "sharded" else contextlib.nullcontext():
        yield


def put(entries: memory.Memory | None, reader: Reader | None) -> Any:
    """Puts a memory to where the reader looks for it."""
    return None if entries is None else PLACES[table.place(reader.name)](entries)


def put_slots(slots: Slots, reader: Reader) -> Any:
    """Puts slots to where the reader looks for them, as the only layer of a memory."""
    filled = (slots.documents >= 0).sum(1, dtype=jnp.int32)
    return put(memory.Memory(slots.keys[None], slots.values[None], slots.documents, filled), reader).slots(0)


def read(slots: Slots, reader: Reader) -> Partial:
    return _read(put_slots(slots, reader), reader)


@functools.partial(jax.jit, static_argnums=1)
def _read(slots: Any, reader: Reader) -> Partial:
    return table.read(draw(B, T, N, H), jnp.asarray(QUERIES), slots, reader)


def brute_force(slots: Slots, neighbours: int, multi_doc: bool) -> Partial:
    """For each query and head on its own: sort the visible slots by logit, softmax over the first ones."""
    q, (k, v, documents) = np.asarray(draw(B, T, N, H)), map(np.asarray, slots[:3])
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for row, time, head in np.ndindex(lse.shape):
        visible = np.flatnonzero((documents[row] >= 0) & (multi_doc | (documents[row] == QUERIES[row, time])))
        group = head // (N // G)
        s = k[row, group, visible] @ q[row, time, head]
        best = np.argsort(-s)[:neighbours]
        if len(best):
            p = np.exp(s[best])
            out[row, time, head] = p @ v[row, group, visible[best]] / p.sum()
            lse[row, time, head] = np.log(p.sum())
    return Partial(out, lse)


def test_readers_of_the_config_are_those_there_are():
    assert set(READERS) == set(READER_NAMES)


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_reading_all_slots_is_the_softmax_over_visible_ones(name, multi_doc):
    close(read(slots(), reader(name, multi_doc=multi_doc)), brute_force(slots(), M, multi_doc), 1e-5)


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("neighbours", [1, 4])
@pytest.mark.parametrize("name", EXACT)
def test_exact_readers_are_the_brute_force_top_k(name, neighbours, multi_doc):
    found = read(slots(), reader(name, neighbours=neighbours, multi_doc=multi_doc))
    close(found, brute_force(slots(), neighbours, multi_doc), 1e-5)


@pytest.mark.parametrize("neighbours", [M, M + 5])
def test_knn_with_all_slots_as_neighbours_equals_dense(neighbours):
    close(read(slots(), reader("knn", neighbours=neighbours)), read(slots(), reader("dense")))


@pytest.mark.parametrize("name", READERS)
def test_block_changes_no_result(name):
    first, *rest = (read(slots(), reader(name, neighbours=4, block=block)) for block in BLOCKS)
    for other in rest:
        close(other, first)


@pytest.mark.parametrize("name", READERS)
def test_the_place_of_an_entry_in_the_ring_does_not_matter(name):
    order = np.random.default_rng(0).permutation(M)
    keys, values, documents = slots()[:3]
    moved = Slots(keys[:, :, order], values[:, :, order], documents[:, order])
    close(read(moved, reader(name, neighbours=4)), read(slots(), reader(name, neighbours=4)))


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_entries_that_are_not_visible_leave_no_trace(name, multi_doc):
    """Empty slots and, in single-doc mode, other documents: whatever they hold."""
    before = read(slots(), reader(name, neighbours=4, multi_doc=multi_doc))
    document = 0  # that of the first queries of row 0
    hidden = (DOCUMENTS == -1) if multi_doc else (DOCUMENTS != document)
    loud = slots()._replace(
        keys=jnp.where(hidden[:, None, :, None], 1e4, slots().keys),
        values=jnp.where(hidden[:, None, :, None], 1e4, slots().values),
    )
    after = read(loud, reader(name, neighbours=4, multi_doc=multi_doc))
    same(*(jax.tree.map(lambda x: x[0, :3], part) for part in (before, after)))


@pytest.mark.parametrize("name", READERS)
def test_reading_nothing_gives_nothing(name):
    nothing = Partial(np.zeros((T, N, H)), np.full((T, N), -np.inf))
    same(jax.tree.map(lambda x: x[2], read(slots(), reader(name))), nothing)
    for capacity in (0, 3):
        empty = memory.empty(1, B, capacity, G, H, jnp.float32).slots(0)
        same(jax.tree.map(lambda x: x[0], read(empty, reader(name))), nothing)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_into_a_memory_are_finite_and_spare_empty_slots(name):
    def loss(slots):
        held = put_slots(slots, reader(name, neighbours=4))
        part = table.read(draw(B, T, N, H), jnp.asarray(QUERIES), held, reader(name, neighbours=4))
        return (part.out**2).sum()

    keys, values = jax.jit(jax.grad(loss, allow_int=True))(slots())[:2]
    for gradient in (keys, values):
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0
        assert (np.asarray(gradient).swapaxes(1, 2)[DOCUMENTS == -1] == 0).all()


@pytest.mark.parametrize("name", [name for name in WITH_GRADIENT if name != "dense"])
def test_gradients_of_all_slots_as_neighbours_are_those_of_dense(name):
    def loss(q, slots, name):
        ask = reader(name, neighbours=M)._replace(probes=M, recall_target=0.999)
        part = table.read(q, jnp.asarray(QUERIES), put_slots(slots, ask), ask)
        return (part.out**2).sum() + attention.finite(part.lse).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1), allow_int=True), static_argnums=2)
    (q, (keys, values, *_)), (dense_q, (dense_keys, dense_values, *_)) = (
        gradient(draw(B, T, N, H), slots(), each) for each in (name, "dense")
    )
    close((q, keys, values), (dense_q, dense_keys, dense_values), 1e-5)
    assert min(jnp.abs(x).max() for x in (q, keys, values)) > 0.1


# Reading inside the model.

MODEL = ModelConfig(
    vocab_size=32,
    layers=3,
    dim=16,
    heads=N,
    kv_heads=G,
    head_dim=H,
    mlp_dim=24,
    memory_layers=(0, 2),
    attention_block=4,
)
TOKENS = Tokens(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (B, T)))


@functools.cache
def params(config: ModelConfig) -> model.Params:
    return jax.jit(lambda key: model.init(key, config))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(1, 4))
def _hidden(params, config, inputs, read_from, reader):
    return model.apply(params, inputs, TOKENS, config, memory=read_from, reader=reader).hidden


def hidden(config: ModelConfig, read_from: memory.Memory | None, reader: Reader | None) -> jax.Array:
    return _hidden(params(config), config, jnp.arange(B * T).reshape(B, T), put(read_from, reader), reader)


@pytest.mark.parametrize(("capacity", "gate"), [(6, False), (6, True), (0, False)])
@pytest.mark.parametrize("name", READERS)
def test_empty_memory_is_no_memory_bit_for_bit(name, capacity, gate):
    config = dataclasses.replace(MODEL, memory_gate=gate)
    empty = memory.empty(LAYERS, B, capacity, G, H, jnp.float32)
    same(hidden(config, empty, reader(name)), hidden(config, None, None))


@pytest.mark.parametrize("name", READERS)
def test_a_row_reads_its_own_memory_alone(name):
    entries = draw(LAYERS, B, 4, G, H, seed=1), draw(LAYERS, B, 4, G, H, seed=2), jnp.zeros((B, 4), jnp.int32)
    written = memory.write(memory.empty(LAYERS, B, 6, G, H, jnp.float32), *entries)
    full, without = hidden(MODEL, written, reader(name)), hidden(MODEL, None, None)
    cleared = hidden(MODEL, memory.clear(written, jnp.array([True, False, True])), reader(name))
    same(cleared[1], full[1])
    same(cleared[::2], without[::2])
    assert (full != without).any(-1).all()
