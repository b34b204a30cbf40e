"""Learning rate schedules and optimizers, as optax chains.

AdamW follows OpenLLaMA, as LongLLaMA does; AdaFactor with the inverse square root trains the paper's small models
(FoT, Appendix A). `learning_rate(config, steps)(step)` is the rate of the update that follows `step` finished ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fot.config import OptimizerConfig

# Which parameters are subject to weight decay. By name: stacked over the layers, norms have two axes, as matrices do.
DECAYS = {
    "embedding": True,
    "query": True,
    "key": True,
    "value": True,
    "output": True,
    "gate": True,
    "up": True,
    "down": True,
    "head": True,
    "query_bias": False,
    "key_bias": False,
    "value_bias": False,
    "temperature": False,
    "memory_gate": False,
    "attention_norm": False,
    "mlp_norm": False,
    "final_norm": False,
}
STACKED = "layers"  # the group of parameters with a leading layer axis


class PerLayerState(NamedTuple):
    """State of `per_layer`: `layers` has a leading layer axis in every leaf, counts included."""

    layers: Any
    rest: Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: finished updates (int or array) -> learning rate of the next, float32.

    A linear warm-up from 0 reaches the peak after `warmup_steps`; then, with s the step,
    constant: peak; cosine: half a cosine from the peak to `min_learning_rate` at `steps`;
    rsqrt: max(peak · sqrt(warmup_steps / s), min_learning_rate).
    """
    peak, low, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps

    def cosine(step):
        share = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        return low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * share))

    after_warmup = {
        "constant": lambda step: jnp.full_like(step, peak),
        "cosine": cosine,
        "rsqrt": lambda step: jnp.maximum(peak * jnp.sqrt(warmup / jnp.maximum(step, 1)), low),
    }[config.schedule]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        return jnp.where(step < warmup, peak * step / max(warmup, 1), after_warmup(step))

    return schedule


def decay_mask(params: Any) -> Any:
    """Returns params' tree with True where weight decay applies, by the last name of the path.

    Raises:
      ValueError: a parameter whose name isn't in `DECAYS`.
    """

    def decays(path, _):
        name = path[-1].key
        if name not in DECAYS:
            raise ValueError(f"parameter {jax.tree_util.keystr(path)}: say in optimizer.DECAYS whether it decays")
        return DECAYS[name]

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by the global norm, the optimizer, decoupled weight decay and the learning rate, in a chain.

    One update is params - rate · (direction + weight_decay · params), the decay masked by `decay_mask`.
    Moments take the dtype of the parameters, which are float32.

    Args:
      config: name, rates and moments.
      steps: optimizer steps of the whole run.
    """
    transforms = [DIRECTIONS[config.name](config)]
    if config.clip_norm > 0:
        transforms.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay > 0:
        transforms.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    transforms.append(optax.scale_by_learning_rate(learning_rate(config, steps)))
    return optax.chain(*transforms)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=jnp.float32)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdaFactor (Shazeer and Stern, 2018) with momentum `beta1` and optax's constants for the rest.

    The second moment's decay is 1 - step^-0.8 and the rate is relative to each parameter's RMS, so `beta2` and
    `epsilon` have no part in it. It ends in scale(-1), which is undone for the sake of a common sign.
    """
    momentum = config.beta1 if config.beta1 > 0 else None
    return optax.chain(per_layer(optax.adafactor(learning_rate=None, momentum=momentum)), optax.scale(-1))


DIRECTIONS = {"adamw": _adamw, "adafactor": _adafactor}


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to every layer of the stacked parameters [L, ...] as if they were not stacked.

    optax.adafactor factors the two largest axes, one of which may be L in a deep model, and takes the RMS of whole
    leaves, which would tie the layers to each other.
    """

    def init(params):
        layers, rest = _split(params)
        return PerLayerState(jax.vmap(inner.init)(layers), inner.init(rest))

    def update(updates, state, params):
        (update_layers, update_rest), (layers, rest) = _split(updates), _split(params)
        update_layers, state_layers = jax.vmap(inner.update)(update_layers, state.layers, layers)
        update_rest, state_rest = inner.update(update_rest, state.rest, rest)
        return {STACKED: update_layers} | update_rest, PerLayerState(state_layers, state_rest)

    return optax.GradientTransformation(init, update)


def _split(params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return params[STACKED], {name: value for name, value in params.items() if name != STACKED}
