"""Whatever reads the memory and wherever it lies, the same tokens come."""

import dataclasses

import jax
import pytest

from fot import config as config_lib
from fot import generate, incremental, sharding
from tests.generating import TINY, drawn, one_device, prompts_of, tiny_config_of

READER_MESHES = {name: config_lib.MeshConfig(sequence=4, tensor=2) for name in ("sharded_dense", "sharded_knn")}


@pytest.fixture(scope="module")
def mesh():
    return one_device()


@pytest.fixture(scope="module")
def tiny(mesh):
    return incremental.prepare(drawn(TINY), TINY, mesh)


@pytest.mark.parametrize("reader", [name for name in config_lib.READER_NAMES if name != "dense"])
def test_readers_that_find_everything_generate_what_dense_does(reader, mesh, tiny):
    """Also where attention depends on how much is in the memory."""
    model = dataclasses.replace(TINY, logn_keys=8)
    dense, other = (
        dataclasses.replace(tiny_config_of(max_new_tokens=12, reader=name), model=model) for name in ("dense", reader)
    )
    prompts = prompts_of((40, 20))
    wanted = generate.generate(tiny, dense, prompts, mesh)
    on, params = mesh, tiny
    if reader in READER_MESHES:
        on = sharding.make_mesh(READER_MESHES[reader], jax.devices())
        params = incremental.prepare(drawn(TINY), TINY, on)
    found = generate.generate(params, other, prompts, on)
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]


@pytest.mark.slow
def test_rows_and_heads_are_spread_over_devices(mesh, tiny):
    prompts, many = prompts_of((30, 20, 7)), sharding.make_mesh(config_lib.MeshConfig(tensor=2), jax.devices())
    config = tiny_config_of(max_new_tokens=12)
    found = generate.generate(incremental.prepare(drawn(TINY), TINY, many), config, prompts, many)
    wanted = generate.generate(tiny, config, prompts, mesh)
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]


def test_the_kernel_generates_what_the_jnp_form_does(mesh):
    prompts = prompts_of((40, 20))
    rows = []
    for kernel in ("jnp", "pallas"):
        model = dataclasses.replace(TINY, attention_kernel=kernel)
        config = dataclasses.replace(tiny_config_of(max_new_tokens=8), model=model)
        rows.append(generate.generate(incremental.prepare(drawn(TINY), TINY, mesh), config, prompts, mesh))
    jnp_form, kernels = rows
    assert [row.tolist() for row in kernels] == [row.tolist() for row in jnp_form]
