"""Crossbatch attention by kernels inside the model: same numbers, on any mesh; which devices have them."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from fot import attention, crossbatch, device, joint, model, sharding
from fot import config as config_lib
from fot.attention import Tokens
from fot.config import CrossbatchConfig, MeshConfig, ModelConfig
from fot.contexts import attend_contexts
from fot.crossbatch import Table
from fot.errors import ConfigError
from fot.kernels.passes import Keys

B, T = 8, 16
MODEL = ModelConfig(
    vocab_size=32,
    layers=2,
    memory_layers=(0, 1),
    dim=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_dim=16,
    attention_block=8,
    attention_kernel="pallas",
)
CROSSBATCH = CrossbatchConfig(packing=2)


def tokens() -> Tokens:
    """A document a pack of two rows; the last one ends early."""
    documents, positions = np.repeat(np.arange(4), 2 * T), np.tile(np.arange(2 * T), 4)
    documents[-5:] = -1
    return Tokens(*(jnp.asarray(x.reshape(B, T), jnp.int32) for x in (documents, positions)))


def loss_and_gradients(config: ModelConfig, table: Table, keep: slice = slice(None)):
    params = model.init(jax.random.key(0), config)
    inputs = jax.random.randint(jax.random.key(1), (B, T), 0, config.vocab_size)

    @jax.jit
    def run(params):
        def loss(params):
            done = model.apply(params, inputs, tokens(), config, table=table, keep=keep)
            hidden = done.hidden.astype(jnp.float32)
            return (jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)) * hidden).sum(), done

        (value, done), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradients, [read.share for read in done.reads]

    return jax.device_get(run(params))


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), left, right)


def with_jnp(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, attention_kernel="jnp")


@pytest.mark.parametrize(
    ("positions", "qk_norm", "loss_rows"),
    [pytest.param("zero", False, "all", marks=pytest.mark.slow), ("none", True, "last")],
    ids=["LLaMA", "paper"],
)
def test_the_model_is_the_same_with_kernels(positions, qk_norm, loss_rows):
    """With RoPE or without, temperatures or none, all rows or those with a loss; and how it reads its contexts."""
    config = dataclasses.replace(MODEL, memory_positions=positions, qk_norm=qk_norm, remat="mlp")
    table = crossbatch.make_table(CROSSBATCH, B, 2)
    keep = crossbatch.loss_rows(dataclasses.replace(CROSSBATCH, loss_rows=loss_rows))
    close(loss_and_gradients(config, table, keep), loss_and_gradients(with_jnp(config), table, keep))


@pytest.mark.parametrize(
    ("mesh", "groups", "exchange"),
    [
        (MeshConfig(fsdp=4, tensor=2), 4, "ring"),  # contexts on the row's own device
        (MeshConfig(data=2, fsdp=1, tensor=2, sequence=2), 1, "gather"),  # on others too; an axis that splits nothing
        (MeshConfig(data=2, fsdp=1, tensor=2, sequence=2), 1, "ring"),
        (MeshConfig(data=2, fsdp=2, tensor=2), 1, "ring"),
        (MeshConfig(fsdp=8), 1, "ring"),  # 4 rows for the loss are fewer than the devices for them
    ],
    ids=["own", "gathered", "ring of 2", "ring of 4", "few rows"],
)
def test_devices_have_their_rows_and_heads(mesh, groups, exchange):
    made = sharding.make_mesh(mesh, jax.devices())
    table = crossbatch.make_table(dataclasses.replace(CROSSBATCH, groups=groups), B, 4 // groups)
    keep = slice(1, None, 2) if mesh.fsdp == 8 else slice(None)
    queries, everything = Tokens(*(x[keep] for x in tokens())), tokens()
    seen = Table(*(x[keep] for x in table))
    draw = np.random.default_rng(0).normal
    q, k, v, far = (jnp.asarray(draw(size=(B, T, n, 4)), jnp.float32) for n in (4, 2, 2, 2))
    local = attention.attend_local(q[keep], k[keep], v[keep], queries, 8)
    both = attention.merge(local, attend_contexts(q[keep], far, v, queries, everything, seen, 8))

    @jax.jit
    def run(q, k, v, far):
        def loss(q, k, v, far):
            done = joint.attend(q[keep], Keys(k[keep], v[keep]), Keys(far, v), queries, everything, seen, exchange)
            return jnp.sin(done.out).sum(), done

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, far)

    alone, _ = run(q, k, v, far)
    with jax.set_mesh(made):
        spread, done = run(q, k, v, far)
    np.testing.assert_allclose(done.out, both.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(done.lse, both.lse, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), spread, alone)


TABLE = crossbatch.make_table(CROSSBATCH, B, 2)


def on(kind: str, platform: str = "tpu"):
    """Devices of this kind, which are not there."""
    absent = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=absent))


@pytest.mark.parametrize(
    ("kind", "platform", "runs"),
    [
        ("TPU v4", "tpu", {"auto": True, "jnp": False, "pallas": True}),
        ("TPU v5 lite", "tpu", {"auto": True, "jnp": False, "pallas": True}),
        ("TPU v3", "tpu", {"auto": False, "jnp": False, "pallas": False}),
        ("cpu", "cpu", {"auto": False, "jnp": False, "pallas": True}),
    ],
)
def test_kernels_run_on_tpus_that_can_and_elsewhere_when_asked(kind, platform, runs):
    with on(kind, platform):
        for choice, expected in runs.items():
            config = dataclasses.replace(MODEL, attention_kernel=choice)
            assert joint.runs(config, TABLE, None) == expected
            assert not joint.runs(config, crossbatch.none(CROSSBATCH, B, 1), None)
            assert not joint.runs(config, None, None)


def test_a_v3_says_once_that_it_has_the_jnp_form(caplog):
    device._tell.cache_clear()
    with on("TPU v3"), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not joint.runs(MODEL, TABLE, None)
        assert not joint.runs(with_jnp(MODEL), TABLE, None)
    (record,) = caplog.records
    assert record.getMessage().startswith("TPU v3 runs no attention kernels: attention takes its jnp forms")


def test_the_default_on_a_cpu_has_no_kernel_in_it():
    config = dataclasses.replace(MODEL, attention_kernel=ModelConfig().attention_kernel)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    inputs = jnp.zeros((B, T), jnp.int32)

    def text(config: ModelConfig) -> str:
        return str(jax.make_jaxpr(lambda p: model.apply(p, inputs, tokens(), config, table=TABLE).hidden)(params))

    assert "pallas_call" in text(MODEL)
    assert "pallas_call" not in text(config) and text(config) == text(with_jnp(config))


def test_the_gate_keeps_local_context_and_contexts_apart():
    gated = dataclasses.replace(MODEL, attention_kernel="auto", memory_gate=True)
    with on("TPU v4"):
        assert not joint.runs(gated, TABLE, None)
    with pytest.raises(ConfigError, match=r"attention_kernel=pallas .* memory_gate=True .*=auto or jnp"):
        dataclasses.replace(gated, attention_kernel="pallas")
    with pytest.raises(ConfigError, match="attention_kernel"):
        dataclasses.replace(MODEL, attention_kernel="palas")


def test_a_run_may_go_on_with_another_choice():
    from fot import checkpoint

    assert "model.attention_kernel" in checkpoint.CHANGEABLE
    assert config_lib.ExperimentConfig().model.attention_kernel == "auto"
