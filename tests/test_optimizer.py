"""Properties of the schedules, of weight decay and of AdaFactor on stacked layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fot.config import OptimizerConfig
from fot.optimizer import DECAYS, decay_mask, learning_rate, optimizer, per_layer

LAYERS, DIM, HEADS, HEAD_DIM, MLP, VOCABULARY, STEPS = 3, 16, 2, 4, 24, 32, 1000
SPARED = {
    "layers/attention/query_bias",
    "layers/attention/key_bias",
    "layers/attention/value_bias",
    "layers/attention/temperature",
    "layers/attention/memory_gate",
    "layers/attention_norm",
    "layers/mlp_norm",
    "final_norm",
}


def make_params(dim: int = DIM) -> dict:
    """Every parameter a model can have, all ones but for noise."""
    shapes = {
        "embedding": (VOCABULARY, dim),
        "layers": {
            "attention": {
                "query": (LAYERS, dim, HEADS, HEAD_DIM),
                "key": (LAYERS, dim, HEADS, HEAD_DIM),
                "value": (LAYERS, dim, HEADS, HEAD_DIM),
                "query_bias": (LAYERS, HEADS, HEAD_DIM),
                "key_bias": (LAYERS, HEADS, HEAD_DIM),
                "value_bias": (LAYERS, HEADS, HEAD_DIM),
                "output": (LAYERS, HEADS, HEAD_DIM, dim),
                "temperature": (LAYERS, HEADS),
                "memory_gate": (LAYERS, HEADS),
            },
            "attention_norm": (LAYERS, dim),
            "mlp_norm": (LAYERS, dim),
            "mlp": {"gate": (LAYERS, dim, MLP), "up": (LAYERS, dim, MLP), "down": (LAYERS, MLP, dim)},
        },
        "final_norm": (dim,),
        "head": (dim, VOCABULARY),
    }
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(1 + 0.1 * noise.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def named(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def config(**changes) -> OptimizerConfig:
    return dataclasses.replace(
        OptimizerConfig(learning_rate=0.01, min_learning_rate=0.001, warmup_steps=100), **changes
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine", "rsqrt"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    rate = learning_rate(config(schedule=schedule), STEPS)
    np.testing.assert_allclose([rate(0), rate(50), rate(100)], [0, 0.005, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("constant", 0.01, 0.01), ("cosine", 0.0055, 0.001), ("rsqrt", 0.01 * (100 / 550) ** 0.5, 0.01 * 0.1**0.5)],
)
def test_schedule_after_the_peak(schedule, middle, end):
    rate = learning_rate(config(schedule=schedule), STEPS)
    np.testing.assert_allclose([rate(550), rate(STEPS)], [middle, end], rtol=1e-6)


def test_cosine_and_rsqrt_stay_at_the_floor():
    for schedule in ("cosine", "rsqrt"):
        np.testing.assert_allclose(learning_rate(config(schedule=schedule), STEPS)(10**6), 0.001, rtol=1e-6)


def test_no_warm_up_starts_at_the_peak_and_a_run_shorter_than_its_warm_up_works():
    assert learning_rate(config(warmup_steps=0), STEPS)(0) == np.float32(0.01)
    np.testing.assert_allclose(learning_rate(config(), 10)(10), 0.001, rtol=1e-6)


def test_schedule_of_a_traced_step_equals_that_of_an_int():
    rate = learning_rate(config(), STEPS)
    assert jax.jit(rate)(jnp.int32(300)) == pytest.approx(float(rate(300)), rel=1e-6)


def test_decay_spares_exactly_norms_biases_temperatures_and_gates():
    mask = named(decay_mask(make_params()))
    assert {name for name, decays in mask.items() if not decays} == SPARED
    assert {name.split("/")[-1] for name in mask} == set(DECAYS)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_with_zero_gradients_only_decayed_parameters_move_and_by_rate_times_decay(name):
    params = make_params()
    transform = optimizer(config(name=name, schedule="constant", warmup_steps=0, weight_decay=0.1), STEPS)
    step = jax.jit(lambda p: transform.update(jax.tree.map(jnp.zeros_like, p), transform.init(p), p))
    updates, _ = step(params)
    for path, update in named(updates).items():
        expected = jnp.zeros_like(update) if path in SPARED else -0.01 * 0.1 * named(params)[path]
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


def test_a_parameter_with_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="mystery"):
        decay_mask(make_params() | {"mystery": jnp.ones(3)})


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    params = make_params()
    small = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    norm = optax.tree.norm(small)
    for clip, scale in ((0.0, 1.0), (1e-4, 1e-4 / norm)):
        transform = optimizer(config(name="adamw", clip_norm=clip), STEPS)
        _, state = jax.jit(lambda g, p, t=transform: t.update(g, t.init(p), p))(small, params)
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
        np.testing.assert_allclose(adam.mu["head"], 0.1 * 1e-3 * scale, rtol=1e-5)


def _is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_is_float32_or_counts_and_both_optimizers_learn(name):
    params = {"layers": {"mlp": {"up": jnp.ones((LAYERS, 4, 4))}}, "head": jnp.ones((4, 4))}
    transform = optimizer(config(name=name, learning_rate=0.05, warmup_steps=1, clip_norm=1.0), 50)
    state = transform.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("float32"), np.dtype("int32")}
    loss = jax.jit(lambda p: sum(jnp.sum(jnp.square(x - 0.5)) for x in jax.tree.leaves(p)))
    first = loss(params)
    step = jax.jit(lambda p, s: transform.update(jax.grad(loss)(p), s, p))
    for _ in range(50):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.2 * first


def test_adafactor_treats_stacked_layers_as_if_they_were_apart():
    layers = 200  # more than the matrices' sizes: optax alone would factor the layer axis
    keys = jax.random.split(jax.random.key(1), 2)
    up, gradient = (jax.random.normal(k, (layers, 130, 132)) for k in keys)
    inner = optax.adafactor(learning_rate=None, momentum=0.9)
    transform = per_layer(inner)
    stacked = {"layers": {"up": up}}
    state = transform.init(stacked)
    assert state.layers[0].v_row["up"].shape == (layers, 130) and state.layers[0].v_col["up"].shape == (layers, 132)
    updates, _ = transform.update({"layers": {"up": gradient}}, state, stacked)
    for layer in (0, 199):
        alone, _ = inner.update(gradient[layer], inner.init(up[layer]), up[layer])
        np.testing.assert_allclose(updates["layers"]["up"][layer], alone, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_abstract_state_matches_the_real_one(name):
    transform = optimizer(config(name=name), STEPS)
    params = make_params(dim=128)
    abstract = jax.eval_shape(transform.init, params)
    real = jax.jit(transform.init)(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
