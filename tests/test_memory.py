"""Properties of memories: what a row keeps, and what every reader makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import memory, model
from fot.attention import Partial, Tokens
from fot.config import READER_NAMES, ModelConfig
from fot.memory import READERS, Reader, Slots

LAYERS, B, T, N, G, H = 2, 3, 5, 4, 2, 4
BLOCKS = [3, 7, 100]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def close(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


# Writing.


class Shelf:
    """What a memory should hold: per row, a list of (document, number of the entry), oldest first."""

    def __init__(self, capacity: int, dtype=jnp.float32):
        self.memory = memory.empty(LAYERS, B, capacity, G, H, dtype)
        self.rows = [[] for _ in range(B)]
        self.count = 0

    def write(self, documents: list[list[int]]):
        documents = np.array(documents, np.int32)
        numbers = self.count + np.arange(documents.size).reshape(documents.shape)
        self.count += documents.size
        entries = np.broadcast_to(numbers[None, :, :, None, None], (LAYERS, *documents.shape, G, H)).astype(np.float32)
        keys = entries + 1000 * np.arange(LAYERS)[:, None, None, None, None]
        self.memory = _write(self.memory, keys, -keys, documents)
        for row, line in enumerate(zip(documents, numbers, strict=True)):
            self.rows[row] += [pair for pair in zip(*map(list, line), strict=True) if pair[0] >= 0]

    def clear(self, rows: list[bool]):
        self.memory = memory.clear(self.memory, jnp.array(rows))
        self.rows = [[] if cleared else row for cleared, row in zip(rows, self.rows, strict=True)]

    def check(self):
        filled = np.asarray(self.memory.documents) >= 0
        for row, entries in enumerate(self.rows):
            kept = sorted(entries[-self.memory.capacity :] if self.memory.capacity else [])
            assert self.memory.length[row] == len(kept)
            for layer in range(LAYERS):
                keys, values, documents = (np.asarray(x)[row, filled[row]] for x in self.memory.slots(layer))
                numbers = (keys - 1000 * layer)[:, 0, 0].astype(int)
                assert sorted(zip(documents, numbers, strict=True)) == kept
                assert (keys == keys[:, :1, :1]).all() and (values == -keys).all()


_write = jax.jit(memory.write)


@pytest.mark.parametrize("capacity", [0, 1, 7, 8, 100])
def test_a_full_row_drops_its_oldest_entries_and_never_takes_padding(capacity):
    shelf = Shelf(capacity)
    shelf.check()
    rng = np.random.default_rng(0)
    for window in range(6):
        documents = np.where(rng.random((B, T)) < 0.7, window, -1)
        documents[0] = -1 if window < 2 else documents[0]
        shelf.write(documents)
        shelf.check()
        assert shelf.memory.capacity == capacity
    shelf.clear([False, True, False])
    shelf.check()
    shelf.write([[9] * T] * B)
    shelf.check()


def test_a_window_longer_than_the_memory_leaves_its_last_entries():
    shelf = Shelf(3)
    shelf.write([[0, 0, 0, 0, 1, -1, 1, 1, -1, -1], [2] * 10, [-1, 3] + [-1] * 8])
    shelf.check()
    assert shelf.memory.length.tolist() == [3, 3, 1]


def test_clear_empties_the_rows_it_is_told_to():
    shelf = Shelf(4)
    shelf.write([[0, 1, 2]] * B)
    shelf.clear([False, False, False])
    shelf.check()
    shelf.clear([True, False, True])
    shelf.check()
    assert shelf.memory.length.tolist() == [0, 3, 0]


def test_entries_are_stored_in_the_dtype_of_the_memory():
    written = memory.write(
        memory.empty(LAYERS, B, 4, G, H, jnp.bfloat16),
        jnp.ones((LAYERS, B, T, G, H)),
        jnp.ones((LAYERS, B, T, G, H)),
        jnp.zeros((B, T), jnp.int32),
    )
    assert written.keys.dtype == written.values.dtype == jnp.bfloat16


# Reading.

M = 17
DOCUMENTS = np.random.default_rng(1).integers(-1, 3, (B, M)).astype(np.int32)
DOCUMENTS[2] = -1  # a row that remembers nothing
QUERIES = np.array([[0, 0, 0, 1, 1], [2, 2, 2, 2, 5], [0, 0, 1, 1, 1]], np.int32)


def slots() -> Slots:
    return Slots(draw(B, M, G, H, seed=1), draw(B, M, G, H, seed=2), jnp.asarray(DOCUMENTS))


def reader(name: str, neighbours: int = M, block: int = 7, multi_doc: bool = True) -> Reader:
    return Reader(name, neighbours, block, multi_doc)


@functools.partial(jax.jit, static_argnums=1)
def read(slots: Slots, reader: Reader) -> Partial:
    return memory.read(draw(B, T, N, H), jnp.asarray(QUERIES), slots, reader)


def brute_force(slots: Slots, neighbours: int, multi_doc: bool) -> Partial:
    """For each query and head on its own: sort the visible slots by logit, softmax over the first ones."""
    q, (k, v, documents) = np.asarray(draw(B, T, N, H)), map(np.asarray, slots)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for row, time, head in np.ndindex(lse.shape):
        visible = np.flatnonzero((documents[row] >= 0) & (multi_doc | (documents[row] == QUERIES[row, time])))
        group = head // (N // G)
        s = k[row, visible, group] @ q[row, time, head]
        best = np.argsort(-s)[:neighbours]
        if len(best):
            p = np.exp(s[best])
            out[row, time, head] = p @ v[row, visible[best], group] / p.sum()
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
def test_knn_is_the_brute_force_top_k(neighbours, multi_doc):
    found = read(slots(), reader("knn", neighbours=neighbours, multi_doc=multi_doc))
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
    moved = jax.tree.map(lambda x: x[:, order], slots())
    close(read(moved, reader(name, neighbours=4)), read(slots(), reader(name, neighbours=4)))


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_entries_that_are_not_visible_leave_no_trace(name, multi_doc):
    """Empty slots and, in single-doc mode, other documents: whatever they hold."""
    before = read(slots(), reader(name, neighbours=4, multi_doc=multi_doc))
    document = 0  # that of the first queries of row 0
    hidden = (DOCUMENTS == -1) if multi_doc else (DOCUMENTS != document)
    loud = slots()._replace(
        keys=jnp.where(hidden[..., None, None], 1e4, slots().keys),
        values=jnp.where(hidden[..., None, None], 1e4, slots().values),
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


@pytest.mark.parametrize("name", READERS)
def test_gradients_into_a_memory_are_finite_and_spare_empty_slots(name):
    def loss(slots):
        part = memory.read(draw(B, T, N, H), jnp.asarray(QUERIES), slots, reader(name, neighbours=4))
        return (part.out**2).sum()

    keys, values, _ = jax.jit(jax.grad(loss, allow_int=True))(slots())
    for gradient in (keys, values):
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0
        assert (np.asarray(gradient)[DOCUMENTS == -1] == 0).all()


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
    return _hidden(params(config), config, jnp.arange(B * T).reshape(B, T), read_from, reader)


@pytest.mark.parametrize(("capacity", "gate"), [(6, False), (6, True), (0, False)])
@pytest.mark.parametrize("name", READERS)
def test_empty_memory_is_no_memory_bit_for_bit(name, capacity, gate):
    config = dataclasses.replace(MODEL, memory_gate=gate)
    empty = memory.empty(1, B, capacity, G, H, jnp.float32)
    same(hidden(config, empty, reader(name)), hidden(config, None, None))


@pytest.mark.parametrize("name", READERS)
def test_a_row_reads_its_own_memory_alone(name):
    entries = draw(1, B, 4, G, H, seed=1), draw(1, B, 4, G, H, seed=2), jnp.zeros((B, 4), jnp.int32)
    written = memory.write(memory.empty(1, B, 6, G, H, jnp.float32), *entries)
    full, without = hidden(MODEL, written, reader(name)), hidden(MODEL, None, None)
    cleared = hidden(MODEL, memory.clear(written, jnp.array([True, False, True])), reader(name))
    same(cleared[1], full[1])
    same(cleared[::2], without[::2])
    assert (full != without).any(-1).all()
