"""Memories on disk: they come back as they were, to the model that made them, or not at all."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import loading, memory, memory_file, sharding
from fot.config import ModelConfig
from fot.errors import UserError
from fot.memory import Memory

MODEL = ModelConfig(kv_heads=2, memory_layers=(0, 2))
PARAMS = {"layers": {"key": jnp.arange(6.0).reshape(2, 3)}, "embedding": jnp.ones((4, 2), jnp.bfloat16)}
OWNER = memory_file.owner(PARAMS, MODEL)


def filled(dtype: str = "float32", capacity: int = 10) -> Memory:
    """Two layers, four rows; the first row has dropped its oldest entries, the last one has none."""
    rng = np.random.default_rng(0)
    held = memory.empty(2, 4, capacity, 2, 3, jnp.dtype(dtype))
    for document in range(2):
        documents = np.where(np.arange(4)[:, None] * 2 + np.arange(7) < 7, document, -1)
        keys, values = (jnp.asarray(rng.normal(size=(2, 4, 7, 2, 3)), jnp.float32) for _ in range(2))
        held = memory.write(held, keys, values, jnp.asarray(documents))
    return memory.clear(held, jnp.arange(4) == 3)


def same(left: Memory, right: Memory) -> None:
    for x, y in zip(*map(jax.tree.leaves, (left, right)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("capacity", [0, 10])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_memory_comes_back_bit_for_bit_and_is_not_read_at_once(tmp_path, dtype, capacity):
    memory_file.save(filled(dtype, capacity), OWNER, tmp_path / "new" / "memory")
    loaded = memory_file.load(tmp_path / "new" / "memory", OWNER)
    same(loaded, filled(dtype, capacity))
    assert capacity == 0 or isinstance(loaded.keys, np.memmap) and isinstance(loaded.values, np.memmap)


def test_a_memory_that_is_spread_comes_back_and_goes_on(tmp_path):
    mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, tensor=2), jax.devices())
    place = loading.memory_sharding(mesh)
    memory_file.save(jax.device_put(filled(), place), OWNER, tmp_path / "memory")
    loaded = memory_file.load(tmp_path / "memory", OWNER)
    same(loaded, filled())
    entries = jnp.ones((2, 4, 3, 2, 3)), jnp.ones((2, 4, 3, 2, 3)), jnp.ones((4, 3), jnp.int32)
    write = loading.store(mesh).write
    same(write(jax.device_put(loaded, place), *entries), memory.write(filled(), *entries))
    same(memory_file.load(tmp_path / "memory", OWNER), filled())


def test_the_fingerprint_is_of_every_bit_and_of_no_place():
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:2])
    assert memory_file.fingerprint(jax.device_put(PARAMS, sharding.replicated(mesh))) == OWNER.fingerprint
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert memory_file.fingerprint(jax.device_put(PARAMS, spread)) == OWNER.fingerprint
    for index in range(6):
        other = PARAMS["layers"]["key"].at[index // 3, index % 3].add(1e-6)
        assert memory_file.fingerprint({**PARAMS, "layers": {"key": other}}) != OWNER.fingerprint
    renamed = {"layers": {"value": PARAMS["layers"]["key"]}, "embedding": PARAMS["embedding"]}
    moved = {**PARAMS, "layers": {"key": PARAMS["layers"]["key"].reshape(3, 2)}}
    for other in (renamed, moved):
        assert memory_file.fingerprint(other) != OWNER.fingerprint


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    memory_file.save(filled(), OWNER, tmp_path / "memory")
    return tmp_path / "memory"


def refused(folder: pathlib.Path, owner: memory_file.Owner = OWNER) -> str:
    with pytest.raises(UserError) as caught:
        memory_file.load(folder, owner)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_another_model_is_refused_and_what_differs_is_named(folder):
    other = dataclasses.replace(MODEL, dim=64, memory_layers=(2,))
    message = refused(folder, OWNER._replace(model=other))
    assert "model.dim: 128 there, 64 here; model.memory_layers: [0, 2] there, [2] here" in message
    same(
        memory_file.load(folder, OWNER._replace(model=dataclasses.replace(MODEL, attention_block=1, remat="full"))),
        filled(),
    )


def test_a_memory_of_a_config_with_other_fields_is_refused(folder):
    about = json.loads((folder / memory_file.ABOUT).read_text())
    del about["model"]["memory_gate"]
    (folder / memory_file.ABOUT).write_text(json.dumps(about))
    assert "model.memory_gate: 'missing' there, False here" in refused(folder)


def test_other_parameters_are_refused(folder):
    other = memory_file.owner(jax.tree.map(lambda p: 2 * p, PARAMS), MODEL)
    assert "belongs to other parameters" in refused(folder, other)


@pytest.mark.parametrize("name", memory_file.ARRAYS)
def test_a_damaged_folder_is_refused(folder, name):
    path = folder / f"{name}.npy"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:40], b""):
        path.write_bytes(content)
        assert "damaged" in refused(folder)
    np.save(path, np.zeros(3, np.float64))
    assert "damaged" in refused(folder)
    path.unlink()
    assert "missing" in refused(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"arrays": {}}', '{"arrays'])
def test_a_damaged_description_is_refused(folder, content):
    (folder / memory_file.ABOUT).write_text(content)
    assert "damaged" in refused(folder)


def test_no_memory_is_one_line(tmp_path):
    assert "no memory in" in refused(tmp_path / "none")


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(memory_file.os, "posix_fallocate", full)
        with pytest.raises(UserError, match="No space left on device.*free disk space"):
            memory_file.save(filled(), OWNER, tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []
    memory_file.save(filled(), OWNER, tmp_path / "memory")
    with pytest.raises(UserError, match="exists: choose another"):
        memory_file.save(filled(), OWNER, tmp_path / "memory")
