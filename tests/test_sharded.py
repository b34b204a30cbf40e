"""Properties of a memory whose slots are spread over devices: nothing of its size ever travels."""

import functools
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import loading, memory, sharding
from fot.attention import Partial
from fot.config import ModelConfig
from fot.memory import Memory, Slots
from fot.readers import table
from fot.readers.reader import Reader

LAYERS, B, T, N, G, H = 2, 2, 5, 4, 2, 8
MODEL = ModelConfig(kv_heads=G, head_dim=H, memory_layers=(0, 2))
WHOLE = {"sharded_dense": "dense", "sharded_knn": "knn"}
# Rows and heads may be spread too.
MESHES = {"slots": {"sequence": 8, "fsdp": 1}, "all": {"fsdp": 2, "tensor": 2, "sequence": 2}}


def make(sizes: dict[str, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(config_lib.MeshConfig(**sizes), jax.devices())


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def window(seed: int):
    documents = np.random.default_rng(seed).integers(-1, 3, (B, T)).astype(np.int32)
    return draw(LAYERS, B, T, G, H, seed=seed), draw(LAYERS, B, T, G, H, seed=seed + 100), documents


@functools.partial(jax.jit, static_argnums=1)
def read(slots: Slots, reader: Reader) -> Partial:
    return table.read(jnp.asarray(draw(B, T, N, H)), jnp.asarray(window(5)[2]), slots, reader)


def filled(store: loading.Store, capacity: int, windows: int) -> Memory:
    held = store.empty(MODEL, B, capacity, "float32")
    for index in range(windows):
        held = store.write(held, *window(index))
    return held


@pytest.mark.parametrize("windows", [1, 3, 9])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_what_is_written_is_what_one_device_would_hold(sizes, windows):
    mesh = make(sizes)
    held = filled(loading.store_of(Reader("sharded_knn", 4, 3, True, 0.9, 4, 2), mesh), 19, windows)
    assert held.capacity == -(-19 // mesh.shape["sequence"]) * mesh.shape["sequence"]
    assert held.keys.sharding.spec[3] == held.documents.sharding.spec[1] == "sequence"
    wanted = memory.empty(LAYERS, B, held.capacity, G, H, jnp.float32)
    for index in range(windows):
        wanted = memory.write(wanted, *window(index))
    jax.tree.map(np.testing.assert_array_equal, held, wanted)


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize("neighbours", [1, 4, 200])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_it_is_read_as_on_one_device(sizes, name, neighbours, multi_doc):
    mesh = make(sizes)
    held = filled(loading.store_of(Reader(name, 4, 3, True, 0.9, 4, 2), mesh), 37, 6)
    with jax.set_mesh(mesh):
        found = read(held.slots(1), Reader(name, neighbours, 3, multi_doc, 0.9, 4, 2))
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), held.slots(1))
    wanted = read(alone, Reader(WHOLE[name], neighbours, 3, multi_doc, 0.9, 4, 2))
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def collectives(text: str) -> dict[str, list[int]]:
    """Returns {kind: numbers in each array that devices exchange} of a compiled program."""
    found = {}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
            found.setdefault(kind, []).append(int(np.prod([int(n) for n in shape.split(",") if n])))
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_what_devices_exchange_does_not_grow_with_the_memory(name):
    mesh, k, seen = make(MESHES["slots"]), 4, []
    store = loading.store_of(Reader(name, 4, 3, True, 0.9, 4, 2), mesh)
    for capacity in (1024, 8192):
        held = store.empty(MODEL, B, capacity, "float32")
        with jax.set_mesh(mesh):
            text = read.lower(held.slots(0), Reader(name, k, 64, True, 0.9, 4, 2)).compile().as_text()
        seen.append(collectives(text))
        written = store.write.lower(held, *window(0)).compile().as_text()
        assert sum(sum(sizes) for sizes in collectives(written).values()) <= 4 * LAYERS * B * T * G * H
    assert seen[0] == seen[1] and "all-reduce" in seen[0]
    most = max(B * T * N * H, B * T * N * k * mesh.shape["sequence"])
    assert all(size <= most for sizes in seen[0].values() for size in sizes)
    assert ("all-gather" in seen[0]) == (name == "sharded_knn")


PROCESS = """
import sys
import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=120)

from fot import config as config_lib
from fot import loading, sharding
from fot.readers.reader import Reader
from tests import test_sharded as here

mesh = sharding.make_mesh(config_lib.MeshConfig(fsdp=1, sequence=4), jax.devices())
assert mesh.devices.size == 4 and len(jax.local_devices()) == 2
results = []
for name in here.WHOLE:
    store = loading.store_of(Reader(name, 4, 3, True, 0.9, 4, 2), mesh)
    with jax.set_mesh(mesh):
        held = store.empty(here.MODEL, here.B, 37, "float32")
        for index in range(6):
            entries = jax.device_put(here.window(index), sharding.replicated(mesh))
            held = store.write(held, *entries)
        part = here.read(held.slots(1), Reader(name, 4, 3, True, 0.9, 4, 2))
    results += [np.asarray(x.addressable_data(0)) for x in part]
np.savez(sys.argv[3], *results)
"""


def test_across_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / f"{rank}.npz")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    alone = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x)),
        filled(loading.store(make({"data": 1, "fsdp": 1, "sequence": -1})), 40, 6).slots(1),
    )
    wanted = [x for name in WHOLE.values() for x in read(alone, Reader(name, 4, 3, True, 0.9, 4, 2))]
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for left, right in zip(found.values(), wanted, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
