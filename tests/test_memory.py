"""Properties of memories: what a row keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import memory

LAYERS, B, T, N, G, H = 2, 3, 5, 4, 2, 4
BLOCKS = [3, 7, 100]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def close(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


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
                slots = self.memory.slots(layer)
                keys, values = (np.asarray(x)[row].swapaxes(0, 1)[filled[row]] for x in slots[:2])
                documents = np.asarray(slots.documents)[row, filled[row]]
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
