"""Properties of the loss: the formula, what counts, and which rows and masks a plan asks for."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fot import crossbatch, model, objective
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ExperimentConfig

SHAPE = 8, 16


@pytest.fixture
def config(tiny_config) -> ExperimentConfig:
    return replace(tiny_config, model=dict(layers=2, memory_layers=(1,)), crossbatch=dict(d=(2,)))


def replace(config: ExperimentConfig, **groups) -> ExperimentConfig:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in groups.items()}
    )


def make_batch() -> Batch:
    """Packs of two rows; in each, a document ends in the first row."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 512, (2, *SHAPE), dtype=np.int32)
    places = np.arange(SHAPE[0] * SHAPE[1], dtype=np.int32).reshape(4, -1) % 32
    documents = np.where(places < 5, 2 * np.arange(4)[:, None], 2 * np.arange(4)[:, None] + 1).astype(np.int32)
    positions = np.where(places < 5, places + 40, places - 5).astype(np.int32)
    weights = (rng.random(SHAPE) < 0.7).astype(np.float32)
    return Batch(tokens, targets, weights, documents.reshape(SHAPE), positions.reshape(SHAPE))


@functools.cache
def params(config: ExperimentConfig) -> model.Params:
    return jax.jit(lambda: model.init(jax.random.key(0), config.model))()


@functools.partial(jax.jit, static_argnums=2)
def sums_and_gradients(params, batch, config):
    plan = objective.plan(config, config.crossbatch.d[0])
    gradient, sums = jax.grad(objective.loss_sums, has_aux=True)(params, batch, config.model, plan)
    return sums, gradient


def evaluate(config, batch):
    return sums_and_gradients(params(config), batch, config)


@functools.partial(jax.jit, static_argnums=2)
def logits(params, batch, config):
    table = crossbatch.make_table(config.crossbatch, SHAPE[0], config.crossbatch.d[0])
    tokens = Tokens(batch.documents, batch.positions)
    return model.unembed(
        params, model.apply(params, batch.tokens, tokens, config.model, table=table).hidden, config.model
    )


@pytest.mark.parametrize("loss_rows", ["all", "last"])
def test_loss_is_the_weighted_negative_log_likelihood_of_its_rows(config, loss_rows):
    config, batch = replace(config, crossbatch=dict(loss_rows=loss_rows)), make_batch()
    rows = slice(None) if loss_rows == "all" else slice(1, None, 2)
    scores = np.asarray(logits(params(config), batch, config), np.float64)[rows]
    targets, weights = batch.targets[rows], batch.weights[rows]
    nll = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    sums, _ = evaluate(config, batch)
    np.testing.assert_allclose(sums.nll, (nll * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.weight, weights.sum())
    np.testing.assert_allclose(sums.correct, ((scores.argmax(-1) == targets) * weights).sum())


@pytest.mark.parametrize("block", [1, 5, 8, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_blocks_of_the_loss_change_neither_sums_nor_gradients(config, block, tied):
    config, batch = replace(config, model=dict(tied_embeddings=tied, loss_block=2 * SHAPE[1])), make_batch()
    blocks = replace(config, model=dict(loss_block=block))
    for got, expected in zip(
        jax.tree.leaves(sums_and_gradients(params(config), batch, blocks)),
        jax.tree.leaves(plain_sums_and_gradients(params(config), batch, config)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnums=2)
def plain_sums_and_gradients(params, batch, config):
    """Every logit at once, differentiated by JAX."""

    def loss(params):
        plan = objective.plan(config, config.crossbatch.d[0])
        tokens = Tokens(batch.documents, batch.positions)
        output = model.apply(params, batch.tokens, tokens, config.model, table=plan.table)
        nll, correct = objective.token_nll(params, output.hidden, batch.targets, config.model)
        return (nll * batch.weights).sum(), ((correct * batch.weights).sum(), batch.weights.sum())

    (nll, counts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return objective.Sums(nll, *counts), gradient


def test_accuracy_counts_the_most_likely_tokens(config):
    batch = make_batch()
    best = np.asarray(logits(params(config), batch, config)).argmax(-1).astype(np.int32)
    sums, _ = evaluate(config, batch._replace(targets=best))
    assert sums.correct == sums.weight == batch.weights.sum()


def test_targets_without_weight_change_nothing(config):
    batch = make_batch()
    other = np.where(batch.weights > 0, batch.targets, 7).astype(np.int32)
    assert (other != batch.targets).any()
    jax.tree.map(
        np.testing.assert_array_equal, evaluate(config, batch), evaluate(config, batch._replace(targets=other))
    )


def test_a_batch_without_targets_has_no_gradient(config):
    sums, gradient = evaluate(config, make_batch()._replace(weights=np.zeros(SHAPE, np.float32)))
    assert sums == (0, 0, 0)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


def test_released_behaviour_knows_no_documents(config):
    released = replace(config, crossbatch=dict(variant="released", range=2, mask_documents=False))
    batch = make_batch()
    other = batch._replace(documents=np.full(SHAPE, 3, np.int32), positions=np.zeros(SHAPE, np.int32))
    jax.tree.map(np.testing.assert_array_equal, evaluate(released, batch), evaluate(released, other))
    masked = replace(released, crossbatch=dict(mask_documents=True))
    assert evaluate(masked, batch)[0].nll != evaluate(released, batch)[0].nll


def test_plan_is_of_a_microbatch(config):
    plan = objective.plan(replace(config, train=dict(accumulation=2), crossbatch=dict(loss_rows="last")), 2)
    assert plan.keep == slice(1, None, 2)
    np.testing.assert_array_equal(plan.table.contexts_BC, [[-1, -1], [0, 2], [-1, -1], [2, 0]])
    assert plan.tokens_from_documents


@pytest.mark.parametrize(
    ("mask", "negative"), [(True, [[False, False], [False, True]]), (False, [[False] * 2, [True] * 2])]
)
def test_masks_follow_documents_or_the_released_code(config, mask, negative):
    plan = objective.plan(replace(config, crossbatch=dict(mask_documents=mask)), 2)
    assert plan.tokens_from_documents == mask
    np.testing.assert_array_equal(plan.table.negative_BC[:2], negative)
