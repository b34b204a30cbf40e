"""The train step: its state, its metrics, and one compiled program for each d."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fot import crossbatch, flops, model, objective, optimizer, sharding
from fot.batch import Batch
from fot.config import CrossbatchConfig, ExperimentConfig
from fot.objective import Sums


class TrainState(NamedTuple):
    """All that a step changes; saved whole.

    Attributes:
      step: int32, optimizer steps done, skipped ones included.
      params: float32 parameters.
      optimizer: optax state.
      phase: int32, which phase of `crossbatch.d` the training accuracy has reached.
      skipped: int32, steps skipped for non-finite gradients.
      skipped_in_a_row: int32, of those the last ones without a good step between.
    """

    step: jax.Array
    params: model.Params
    optimizer: Any
    phase: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class StepMetrics(NamedTuple):
    """Device scalars of one step: means over its target tokens, and norms over all parameters.

    Steps with the same `batch_checksum` (uint32) have read the same batch, on whatever mesh.
    """

    loss: jax.Array
    accuracy: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    parameter_norm: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    batch_checksum: jax.Array


def init_state(config: ExperimentConfig) -> TrainState:
    """Draws the state of a new run from `train.seed`."""
    params = model.init(jax.random.key(config.train.seed), config.model)
    zero = jnp.zeros((), jnp.int32)
    state = optimizer.optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(zero, params, state, zero, zero, zero)


def d_at(config: CrossbatchConfig, step: int, phase: int, seed: int) -> int:
    """Returns the crossbatch dimension of a step (FoT, Appendix A: schedules of d).

    Args:
      config: schedule and phases.
      step: steps done before it.
      phase: how often the training accuracy has reached `d_accuracy`.
      seed: of the random draw, one for each step.
    """
    phases = {
        "constant": lambda: 0,
        "steps": lambda: int(np.searchsorted(config.d_steps, step, side="right")),
        "accuracy": lambda: phase,
        "random": lambda: int(np.random.default_rng((seed, step)).integers(len(config.d))),
    }
    return config.d[phases[config.d_schedule]()]


def train_step(state: TrainState, batch: Batch, config: ExperimentConfig, d: int) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on rows [R, T]; with non-finite gradients only the counts of steps and of skips change."""
    gradients, sums = _gradients(state.params, batch, config, objective.plan(config, d))
    norm = optax.tree.norm(gradients)
    transformation = optimizer.optimizer(config.optimizer, config.train.steps)
    good = jnp.isfinite(norm) & jnp.isfinite(sums.nll)
    loss, accuracy = sums.nll / sums.weight, sums.correct / sums.weight
    counts = good & (state.step >= config.crossbatch.d_after)
    reached = (counts & (accuracy >= config.crossbatch.d_accuracy)).astype(jnp.int32)

    @jax.named_scope("optimizer")
    def update(gradients, params, moments):
        updates, moments = transformation.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, optax.tree.norm(updates)

    def skip(gradients, params, moments):
        return params, moments, jnp.float32(0)

    params, moments, update_norm = jax.lax.cond(good, update, skip, gradients, state.params, state.optimizer)
    new = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=moments,
        phase=jnp.minimum(state.phase + reached, len(config.crossbatch.d) - 1),
        skipped=state.skipped + ~good,
        skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
    )
    metrics = StepMetrics(
        loss=loss,
        accuracy=accuracy,
        tokens=sums.weight,
        gradient_norm=norm,
        update_norm=update_norm,
        parameter_norm=optax.tree.norm(new.params),
        skipped=new.skipped,
        skipped_in_a_row=new.skipped_in_a_row,
        batch_checksum=checksum(batch),
    )
    return new, metrics


def checksum(batch: Batch) -> jax.Array:
    """Returns a uint32 that changes with any value in the batch; its sums are exact, so their order is no matter."""
    total = jnp.uint32(0)
    for number, field in enumerate(jax.tree.leaves(batch)):
        real = jnp.issubdtype(field.dtype, jnp.floating)
        bits = jax.lax.bitcast_convert_type(field.astype(jnp.float32), jnp.uint32) if real else field.astype(jnp.uint32)
        place = jnp.uint32(number)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        total += jnp.sum((2 * place + 1) * (bits + 1) * jnp.uint32(0x9E3779B1), dtype=jnp.uint32)
    return total


def _gradients(params: model.Params, batch: Batch, config: ExperimentConfig, plan: objective.Plan) -> tuple[Any, Sums]:
    """Returns gradients of the mean loss over all target tokens, summed up over microbatches, and the batch's sums."""
    gradient = jax.grad(objective.loss_sums, has_aux=True)
    count = config.train.accumulation
    if count == 1:
        total, sums = gradient(params, batch, config.model, plan)
    else:
        zero = jax.tree.map(jnp.zeros_like, params), Sums(*3 * [jnp.zeros(())])

        def step(carry, part):
            return jax.tree.map(jnp.add, carry, gradient(params, part, config.model, plan)), None

        (total, sums), _ = jax.lax.scan(step, zero, _microbatches(batch, config))
    return jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), total), sums


def _microbatches(batch: Batch, config: ExperimentConfig) -> Batch:
    """Returns the microbatches [A, R, T] of a batch, the rows of each spread over devices as those of a batch are."""
    shape = config.train.accumulation, -1, config.data.context
    return jax.tree.map(lambda x: sharding.activation(x.reshape(shape), "microbatches"), batch)


def lower_step(config: ExperimentConfig, mesh: Mesh, d: int) -> jax.stages.Lowered:
    """Lowers the train step of one d, without arrays: the mesh may be of devices that are not there (`fot.compile`)."""
    batch = sharding.batch_sharding(mesh)
    abstract = jax.eval_shape(lambda: init_state(config))
    state = sharding.shardings(abstract, mesh)
    step = jax.jit(
        lambda state, batch: train_step(state, batch, config, d),
        in_shardings=(state, Batch(*5 * [batch])),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    shape = (config.data.batch_size, config.data.context)
    whole, half = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.set_mesh(mesh):
        return step.lower(abstract, Batch(whole, whole, half, whole, whole))


def compile_step(config: ExperimentConfig, mesh: Mesh, d: int) -> Callable[[TrainState, Batch], tuple]:
    """Compiles the train step of one d: (state, batch) -> (state, metrics); the state is given up to it."""
    return lower_step(config, mesh, d).compile()


def held_out_sums(params: model.Params, batch: Batch, config: ExperimentConfig, d: int) -> Sums:
    """Sums of a batch of held-out documents, microbatch by microbatch as in training; d = 0 is without contexts."""
    plan = objective.plan(config, max(d, 1))
    if d == 0:
        plan = plan._replace(table=crossbatch.none(config.crossbatch, len(plan.table.contexts_BC), d))
    parts = _microbatches(batch, config)
    each = jax.lax.map(lambda part: objective.loss_sums(params, part, config.model, plan)[1], parts)
    return jax.tree.map(jnp.sum, each)


def step_flops(config: ExperimentConfig, d: int) -> int:
    """Returns the model's floating point operations of one train step, by the formula of `fot.flops`."""
    plan = objective.plan(config, d)
    rows = len(plan.table.contexts_BC)
    return config.train.accumulation * flops.train_flops(
        config.model,
        rows=rows,
        loss_rows=len(range(rows)[plan.keep]),
        context=config.data.context,
        context_pairs=int((plan.table.contexts_BC >= 0).sum()),
    )
