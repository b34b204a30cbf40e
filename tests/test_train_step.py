"""Properties of the train step on a mesh: loss and gradients of one device, and what devices send each other."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from fot import sharding, train_step
from fot.batch import Batch
from fot.compile import hlo, report
from fot.config import (
    CrossbatchConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from fot.sharding import AXES

# Grouped-query attention whose 8 kv heads split over all devices; a layer that sees contexts, then one that doesn't.
MODEL = ModelConfig(
    layers=2, memory_layers=(0,), dim=32, heads=16, kv_heads=8, head_dim=4, mlp_dim=64, attention_block=8, loss_block=8
)
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if np.prod(sizes) == 8]
SEGMENTS = dict(variant="segments", packing=4, segments=((0, 0), (1, 2), (2, 3), (3, 4)))
RELEASED = dict(variant="released", packing=4, range=5, mask_documents=False)
# What a row sees, whose loss counts, microbatches.
CASES = [
    (dict(d=(3,), loss_rows="last"), 1),
    (SEGMENTS, 2),
    (RELEASED, 1),
    (dict(d=(2,), groups=4, loss_rows="last"), 1),
    (SEGMENTS | dict(groups=2), 1),
    (dict(d=(2,)), 2),
    (RELEASED | dict(loss_rows="last"), 2),
]


def run_of(case: int, mesh: tuple[int, ...]) -> ExperimentConfig:
    """16 rows of 16 tokens; first moments are gradients."""
    crossbatch, accumulation = CASES[case]
    return ExperimentConfig(
        model=MODEL,
        crossbatch=CrossbatchConfig(**crossbatch),
        data=DataConfig(tokenizer="bytes", context=16, batch_size=16, min_document_tokens=(32,)),
        optimizer=OptimizerConfig(beta1=0.0, clip_norm=0.0),
        mesh=MeshConfig(*mesh),
        train=TrainConfig(accumulation=accumulation),
    )


def random_batch(config: ExperimentConfig) -> Batch:
    """Every pack is a document."""
    shape, packing = (config.data.batch_size, config.data.context), config.crossbatch.packing
    tokens, targets = np.random.default_rng(1).integers(0, 200, (2, *shape), dtype=np.int32)
    places = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    documents, positions = np.divmod(places, packing * shape[1])
    return Batch(tokens, targets, (targets < 150).astype(np.float32), documents, positions)


@functools.cache
def loss_and_gradients(config: ExperimentConfig):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: np.prod(dataclasses.astuple(config.mesh))])
    sharding.check_mesh(mesh, config)
    places = sharding.shardings(jax.eval_shape(lambda: train_step.init_state(config)), mesh)
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=places)()
    batch = jax.device_put(random_batch(config), sharding.batch_sharding(mesh))
    state, metrics = train_step.compile_step(config, mesh, config.crossbatch.d[0])(state, batch)
    return jax.device_get((metrics.loss, metrics.accuracy, state.optimizer))


def _marked(mesh: tuple[int, ...]):
    """Two meshes whose rows see rows of other devices; all the others take minutes."""
    marks = [] if MESHES.index(mesh) % 10 == 5 else [pytest.mark.slow]
    return pytest.param(mesh, id="x".join(map(str, mesh)), marks=marks)


@pytest.mark.parametrize("mesh", [_marked(mesh) for mesh in MESHES])
def test_every_mesh_has_the_loss_and_gradients_of_one_device(mesh):
    case = MESHES.index(mesh) % len(CASES)
    alone = loss_and_gradients(run_of(case, (1, 1, 1, 1)))
    spread = loss_and_gradients(run_of(case, mesh))
    for left, right in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def sent(groups: int, d: int, exchange: str = "ring") -> dict[str, int]:
    """Bytes that each of 4 × 2 devices sends in a step whose rows see d documents, by kind of collective and axis."""
    config = dataclasses.replace(
        run_of(0, (1, 4, 2, 1)),
        model=dataclasses.replace(MODEL, attention_exchange=exchange),
        crossbatch=CrossbatchConfig(d=(d,), groups=groups),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    moved: collections.Counter[str] = collections.Counter()
    compiled = train_step.compile_step(config, mesh, d)
    for each in report.collectives(hlo.parse(compiled.as_text()), dict(mesh.shape)):
        moved[f"{each.kind} {each.axes}"] += each.bytes
    return dict(moved)


def test_no_more_is_sent_for_more_contexts_that_are_of_the_device():
    assert sent(4, 1) == sent(4, 2) == sent(1, 1)


@pytest.mark.slow
def test_all_rows_are_gathered_at_the_same_cost_for_any_d():
    whole = sent(1, 2, "gather")
    assert whole == sent(1, 8, "gather") and sum(whole.values()) > sum(sent(4, 2).values())


@pytest.mark.slow
def test_around_the_ring_only_permutes_grow_and_by_the_same_for_each_hop():
    """A device has 2 documents: d = 2, 4 and 6 are 1, 2 and 3 hops."""
    none, *hops = (sent(1, d) for d in (1, 2, 4, 6))
    permute = "collective-permute fsdp"
    grown = [each.pop(permute) for each in hops]
    assert grown[0] > none.pop(permute, 0) and grown[2] - grown[1] == grown[1] - grown[0] > 0
    assert all(each == none for each in hops)


@pytest.mark.parametrize("d", [0, 3])
def test_held_out_sums_are_those_of_microbatches_as_in_training(d):
    config, halved = (
        dataclasses.replace(
            run_of(0, (1, 1, 1, 1)),
            data=DataConfig(tokenizer="bytes", context=16, batch_size=rows, min_document_tokens=(32,)),
            train=TrainConfig(accumulation=accumulation),
        )
        for rows, accumulation in ((16, 2), (8, 1))
    )
    params, batch = train_step.init_state(config).params, random_batch(config)
    whole = train_step.held_out_sums(params, batch, config, d)
    parts = [
        train_step.held_out_sums(params, jax.tree.map(lambda x, first=first: x[first : first + 8], batch), halved, d)
        for first in (0, 8)
    ]
    for got, *wanted in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(got, sum(wanted), rtol=1e-6)


def test_parts_of_the_step_have_names():
    config = run_of(0, (1, 1, 1, 1))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    text = train_step.compile_step(config, mesh, 3).as_text()
    for name in ("projections", "local_attention", "contexts", "mlp", "loss", "optimizer"):
        assert re.search(rf'op_name="[^"]*\b{name}\b', text), name
    for name in ("projections", "local_attention", "contexts", "mlp", "loss"):
        assert re.search(rf'op_name="[^"]*transpose\([^"]*\b{name}\b', text), name
