"""Properties of a memory on the host: it keeps what one on devices keeps, and `host` reads it as `knn` does."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import loading, memory, memory_file, sharding
from fot.attention import Partial
from fot.config import ModelConfig
from fot.errors import UserError
from fot.memory import Memory
from fot.readers import host, table
from fot.readers.reader import Reader

LAYERS, B, T, N, G, H = 2, 3, 5, 4, 2, 8
MODEL = ModelConfig(kv_heads=G, head_dim=H, memory_layers=(0, 2))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def window(seed: int):
    documents = np.random.default_rng(seed).integers(-1, 3, (B, T)).astype(np.int32)
    return draw(LAYERS, B, T, G, H, seed=seed), draw(LAYERS, B, T, G, H, seed=seed + 100), documents


def both(capacity: int, dtype: str, windows: int = 6) -> tuple[Memory, host.HostMemory]:
    """The same windows, written to a device and to the host, and one row emptied on the way."""
    device, here = memory.empty(LAYERS, B, capacity, G, H, dtype), host.empty(LAYERS, B, capacity, G, H, dtype)
    for index in range(windows):
        device, here = memory.write(device, *window(index)), host.write(here, *window(index))
        if index == 3:
            rows = np.array([False, True, False])
            device, here = memory.clear(device, jnp.asarray(rows)), host.clear(here, rows)
    return device, here


@functools.partial(jax.jit, static_argnums=1)
def read(slots, reader: Reader) -> Partial:
    return table.read(draw(B, T, N, H), jnp.asarray(window(5)[2]), slots, reader)


@pytest.mark.parametrize("capacity", [0, 1, 4, 7, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_host_keeps_what_a_device_keeps(capacity, dtype):
    device, here = both(capacity, dtype)
    for left, right in zip(*map(jax.tree.leaves, (device, here.arrays)), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(here.written, device.written)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("capacity", [7, 100])
def test_the_host_finds_what_knn_finds(capacity, multi_doc, dtype):
    device, here = both(capacity, dtype)
    for layer in range(LAYERS):
        for neighbours in (1, 4, 200):
            # In float32 `knn` and `host` take the same values of bfloat16 entries.
            slots = device.slots(layer)._replace(stack=None)
            slots = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, slots)
            wanted = read(slots, Reader("knn", neighbours, 3, multi_doc, 0.9, 4, 2))
            found = read(here.slots(layer), Reader("host", neighbours, 3, multi_doc, 0.9, 4, 2))
            for left, right in zip(found, wanted, strict=True):
                np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def test_one_program_reads_all_memories_as_they_are_now():
    reader = Reader("host", 4, 16, True, 0.9, 4, 2)
    (_, first), (_, second) = both(7, jnp.float32), both(9, jnp.float32, windows=2)
    before, other = read(first.slots(0), reader), read(second.slots(0), reader)
    count = read._cache_size()
    first = host.write(first, *window(50))
    after = read(first.slots(0), reader)
    assert count == read._cache_size()
    assert not np.allclose(before.out, after.out) and not np.allclose(before.out, other.out)


def test_what_nobody_holds_is_freed():
    _, here = both(7, jnp.float32)
    number = int(here.number)
    assert number in host._HELD
    del here
    assert number not in host._HELD


def test_a_memory_of_a_file_is_read_where_it_lies(tmp_path):
    device, here = both(7, jnp.bfloat16)
    owner = memory_file.Owner(MODEL, "0")
    memory_file.save(here.arrays, owner, tmp_path / "memory")
    held = host.hold(memory_file.load(tmp_path / "memory", owner))
    assert isinstance(held.arrays.keys, np.memmap)
    reader = Reader("host", 4, 16, True, 0.9, 4, 2)
    jax.tree.map(np.testing.assert_array_equal, read(held.slots(1), reader), read(here.slots(1), reader))
    # It can go on from there; the file stays as it is.
    held, device = host.write(held, *window(9)), memory.write(device, *window(9))
    np.testing.assert_array_equal(held.arrays.keys, device.keys)
    np.testing.assert_array_equal(memory_file.load(tmp_path / "memory", owner).keys, both(7, jnp.bfloat16)[0].keys)


def test_without_faiss_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"readers 'host' and 'host_lists' need FAISS: pip install 'fot\[faiss\]'"):
        loading.store_of(Reader("host", 4, 16, True, 0.9, 4, 2), mesh).empty(MODEL, B, 4, "float32")
