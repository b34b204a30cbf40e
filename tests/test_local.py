"""Layers that see their row alone, by splash attention: same numbers, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import local, model, sharding
from fot.attention import Tokens
from fot.config import MeshConfig, ModelConfig

B, T, N, G = 4, 200, 4, 2
MODEL = ModelConfig(
    vocab_size=32, layers=2, memory_layers=(), dim=16, heads=N, kv_heads=G, head_dim=4, mlp_dim=16, attention_block=64
)


def tokens() -> Tokens:
    """Documents that begin and end inside rows, and go on from earlier ones; the last row ends in padding."""
    documents, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, cuts in enumerate(([0, 70, 130, T], [0, T], [0, 1, 150, T], [0, 90, 160, T])):
        for number, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            documents[row, begin:end], positions[row, begin:end] = 10 * row + number, np.arange(end - begin)
    positions[1] += 500
    documents[3, 160:] = -1
    return Tokens(jnp.asarray(documents), jnp.asarray(positions))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def with_kernels(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, attention_kernel="pallas")


def value_and_gradients(config: ModelConfig, head_dim: int, rows: int = B):
    """Of what tokens get, weighted; padding left out."""
    shown = Tokens(*(x[B - rows :] for x in tokens()))
    weight = draw(rows, T, N, head_dim, seed=9) * (shown.documents >= 0)[..., None, None]

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out = local.attend(q, k, v, shown, config) * weight
            return out.sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    return jax.device_get(run(*(draw(rows, T, n, head_dim, seed=seed) for seed, n in enumerate((N, G, G)))))


def close(left, right, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


@pytest.mark.parametrize(("head_dim", "block"), [(64, 512), (64, 128), (100, 512)])
def test_splash_attention_is_local_attention_in_value_and_gradient(monkeypatch, head_dim, block):
    """In one block a row, and in two."""
    monkeypatch.setattr(local, "BLOCK", block)
    close(value_and_gradients(with_kernels(MODEL), head_dim), value_and_gradients(MODEL, head_dim), 2e-5)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [(MeshConfig(fsdp=4, tensor=2), B), (MeshConfig(data=2, fsdp=1, tensor=2, sequence=2), B), (MeshConfig(), 3)],
    ids=["rows and heads", "an axis that splits nothing", "rows that can't be split"],
)
def test_devices_have_their_rows_and_heads(mesh, rows):
    wanted = value_and_gradients(MODEL, 8, rows)
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices())):
        close(value_and_gradients(with_kernels(MODEL), 8, rows), wanted)


def step(config: ModelConfig):
    """Loss of all tokens and its gradient."""
    inputs, shown = jax.random.randint(jax.random.key(1), (B, T), 0, config.vocab_size), tokens()

    def loss(params):
        hidden = model.apply(params, inputs, shown, config).hidden
        weight = jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)) * (shown.documents >= 0)[..., None]
        return (weight * hidden).sum()

    return jax.jit(jax.value_and_grad(loss)), model.init(jax.random.key(0), config)


@pytest.mark.parametrize("remat", ["elementwise", pytest.param("mlp", marks=pytest.mark.slow)])
def test_the_model_is_the_same_with_kernels(remat):
    config = dataclasses.replace(MODEL, remat=remat, memory_positions="zero", qk_norm=False)
    (plain, params), (kernels, _) = step(config), step(with_kernels(config))
    assert "splash_mha_fwd" in str(kernels.trace(params).jaxpr)
    close(kernels(params), plain(params), 2e-4)


def test_the_default_on_a_cpu_has_no_kernel_in_it():
    function, params = step(MODEL)
    assert "pallas_call" not in str(function.trace(params).jaxpr)
