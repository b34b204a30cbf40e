"""Next-token loss and its counts (FoT, section 3.2: the standard loss, nothing added)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fot import crossbatch, model
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ExperimentConfig, ModelConfig
from fot.crossbatch import Table
from fot.model import Params


class Sums(NamedTuple):
    """Sums over weighted target tokens; divide by `weight` for means.

    Attributes:
      nll: negative log-likelihood, in nats.
      correct: tokens whose most likely prediction was right.
      weight: total weight.
    """

    nll: jax.Array
    correct: jax.Array
    weight: jax.Array


class _Score(NamedTuple):
    """Of some positions: nll in nats, whether no token is likelier than the target, log of the softmax's sum."""

    nll: jax.Array
    correct: jax.Array
    lse: jax.Array


def _score(logits: jax.Array, targets: jax.Array) -> _Score:
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    lse = jax.nn.logsumexp(logits, -1)
    return _Score(lse - picked, picked >= logits.max(-1), lse)


def token_nll(params: Params, hidden: jax.Array, targets: jax.Array, config: ModelConfig) -> tuple:
    """Returns (nll in nats, whether no token is likelier than the target) for each target, float32 and bool."""
    score = _score(model.unembed(params, hidden, config), targets)
    return score.nll, score.correct


class _Targets(NamedTuple):
    """What is predicted, [R, T]."""

    tokens: jax.Array
    weights: jax.Array


def _in_blocks(step, carry, block: int, *arrays: jax.Array):
    """Scans `step` over blocks of positions of arrays [R, T, …]; returns the carry and what comes out, [R, T, …].

    Rows stay whole, as they may lie on different devices.
    """
    length = arrays[0].shape[1]
    whole = length - length % block

    def split(x):
        return x[:, :whole].reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)

    outs = []
    if whole:
        carry, out = jax.lax.scan(lambda c, xs: step(c, *xs), carry, tuple(map(split, arrays)))
        outs.append(jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], whole, *x.shape[3:]), out))
    if whole < length:
        carry, out = step(carry, *(x[:, whole:] for x in arrays))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *outs)


def _sums(score: _Score, weights: jax.Array) -> Sums:
    return Sums((score.nll * weights).sum(), (score.correct * weights).sum(), weights.sum())


_NOTHING = Sums(*3 * [0.0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _streamed_sums(w_DV: jax.Array, hidden_RTD: jax.Array, targets: _Targets, block: int) -> Sums:
    """Sums over all positions, whose logits exist for `block` positions of each row at a time.

    When a gradient is wanted it is taken along the way: nothing the size of the logits is kept or computed again.
    """

    def step(sums, hidden, tokens, weights):
        score = _score(model.logits(w_DV, hidden), tokens)
        return jax.tree.map(jnp.add, sums, _sums(score, weights)), None

    start = jax.tree.map(jnp.float32, _NOTHING)
    return _in_blocks(step, start, block, hidden_RTD, *targets)[0]


def _streamed_forward(w_DV, hidden_RTD, targets, block):
    w = w_DV.astype(hidden_RTD.dtype)

    def step(carry, hidden, tokens, weights):
        sums, dw = carry
        logits = model.logits(w, hidden)
        score = _score(logits, tokens)
        right = jnp.arange(logits.shape[-1]) == tokens[..., None]
        dlogits = ((jnp.exp(logits - score.lse[..., None]) - right) * weights[..., None]).astype(hidden.dtype)
        dw += jnp.einsum("rtd,rtv->dv", hidden, dlogits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, _sums(score, weights)), dw), dlogits @ w.T

    start = jax.tree.map(jnp.float32, _NOTHING), jnp.zeros(w_DV.shape, jnp.float32)
    (sums, dw_DV), dhidden_RTD = _in_blocks(step, start, block, hidden_RTD, *targets)
    return sums, (dw_DV.astype(w_DV.dtype), dhidden_RTD)


def _streamed_backward(block, saved, cotangent: Sums):
    dw_DV, dhidden_RTD = saved
    return dw_DV * cotangent.nll, dhidden_RTD * cotangent.nll.astype(dhidden_RTD.dtype), None


_streamed_sums.defvjp(_streamed_forward, _streamed_backward)


class Plan(NamedTuple):
    """What the rows of a microbatch are for: static.

    Attributes:
      table: the contexts that each row sees.
      keep: rows whose loss is taken.
      tokens_from_documents: whether masks follow documents, or rows (the released code).
    """

    table: Table
    keep: slice
    tokens_from_documents: bool


def plan(config: ExperimentConfig, d: int) -> Plan:
    """Returns the plan of a training microbatch at crossbatch dimension d."""
    rows = config.data.batch_size // config.train.accumulation
    table = crossbatch.make_table(config.crossbatch, rows, d)
    keep = crossbatch.loss_rows(config.crossbatch)
    if config.crossbatch.mask_documents:
        return Plan(table, keep, True)
    return Plan(crossbatch.without_documents(table), keep, False)


def loss_sums(params: Params, batch: Batch, config: ModelConfig, plan: Plan) -> tuple[jax.Array, Sums]:
    """Returns the summed loss of a microbatch, to differentiate, and its sums.

    Args:
      params: float32 parameters.
      batch: rows [R, T].
      config: the model.
      plan: who sees whom and whose loss counts.
    """
    tokens = Tokens(batch.documents, batch.positions)
    if not plan.tokens_from_documents:
        tokens = crossbatch.rows_as_documents(*batch.tokens.shape)
    output = model.apply(params, batch.tokens, tokens, config, table=plan.table, keep=plan.keep)
    targets = _Targets(batch.targets[plan.keep], batch.weights[plan.keep])
    with jax.named_scope("loss"):
        sums = _streamed_sums(model.head(params, config), output.hidden, targets, config.loss_block)
    return sums.nll, sums
