"""Properties of inverted files over a memory on the host: all lists read is exact, and no entry is lost or stale."""

import functools

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import loading, sharding
from fot.attention import Partial
from fot.config import ModelConfig
from fot.readers import host, host_lists, table
from fot.readers.host import HostMemory
from fot.readers.reader import Reader

LAYERS, B, T, N, G, H, LIST_SIZE = 2, 2, 6, 4, 2, 8, 4
ALL = 1000  # more lists than there are


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def window(seed: int, T: int = T):
    documents = np.random.default_rng(seed).integers(-1, 2, (B, T)).astype(np.int32)
    return draw(LAYERS, B, T, G, H, seed=seed), draw(LAYERS, B, T, G, H, seed=seed + 100), documents


def filled(capacity: int, windows: int = 6, dtype=jnp.float32) -> HostMemory:
    held = host.empty(LAYERS, B, capacity, G, H, dtype)
    for index in range(windows):
        held = host.write(held, *window(index))
    return held


@functools.partial(jax.jit, static_argnums=1)
def _read(slots, reader: Reader) -> Partial:
    return table.read(jnp.asarray(draw(B, T, N, H, seed=7)), jnp.asarray(window(5)[2]), slots, reader)


def read(held: HostMemory, name: str, probes: int = ALL, multi_doc: bool = True, neighbours: int = 5) -> Partial:
    return _read(held.slots(1), Reader(name, neighbours, 16, multi_doc, 0.9, LIST_SIZE, probes))


def close(left: Partial, right: Partial) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("capacity", [9, 100])
def test_with_all_lists_read_it_is_exact(capacity, multi_doc, dtype):
    held = filled(capacity, dtype=dtype)
    expected = read(held, "host", multi_doc=multi_doc)
    assert not held.lists
    held = host_lists.build(held, LIST_SIZE)
    assert len(held.lists) == LAYERS * B * G
    close(read(held, "host_lists", multi_doc=multi_doc), expected)


@pytest.mark.parametrize("capacity", [11, 100])
def test_entries_written_since_are_read_and_overwritten_ones_are_not(capacity):
    held = host.write(host_lists.build(filled(capacity), LIST_SIZE), *window(50))
    close(read(held, "host_lists"), read(held, "host"))
    held = host.write(host_lists.refresh(held, LIST_SIZE), *window(51))
    close(read(held, "host_lists"), read(held, "host"))


def test_refresh_lists_exactly_the_entries_there_are():
    held = host_lists.refresh(host.write(host_lists.build(filled(11), LIST_SIZE), *window(50)), LIST_SIZE)
    for place, head in host.heads(held):
        index, slots = held.lists[place].index, range(len(head.keys))
        assert index.ntotal == len(slots)
        index.set_direct_map_type(faiss.DirectMap.Hashtable)  # by slot: finds each one, and what was listed there
        np.testing.assert_array_equal([index.reconstruct(slot) for slot in slots], head.keys)


def test_a_cleared_row_is_forgotten_and_others_are_kept():
    held = host.clear(host_lists.build(filled(100), LIST_SIZE), np.array([True, False]))
    assert {row for _, row, _ in held.lists} == {1}
    out, lse = read(held, "host_lists")
    assert (np.asarray(lse[0]) == -np.inf).all() and (np.asarray(out[0]) == 0).all()
    close(read(held, "host_lists"), read(held, "host"))


def test_fewer_probes_look_at_fewer_slots():
    held = host_lists.build(filled(400, windows=60), LIST_SIZE)
    found = [np.asarray(read(held, "host_lists", probes, neighbours=1).lse) for probes in (1, 4, ALL)]
    assert (found[0] <= found[1]).all() and (found[1] <= found[2]).all()
    right = [(each == found[2]).mean() for each in found]
    assert 0 < right[0] < right[1] < 1


def test_its_store_lists_a_memory_that_grows():
    model = ModelConfig(kv_heads=G, head_dim=H, memory_layers=(0, 2))
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    store = loading.store_of(Reader("host_lists", 4, 16, True, 0.9, LIST_SIZE, 2), mesh)
    held = store.refresh(store.build(store.empty(model, B, 50, "float32")))
    assert not held.lists
    for index in range(3):
        held = store.build(store.write(held, *window(index)))
    assert {lists.index.nlist for lists in held.lists.values()} <= {3, 4, 5}
    close(read(held, "host_lists"), read(held, "host"))
