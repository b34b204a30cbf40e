"""Crossbatch attention of one device: local context and contexts in one softmax (FoT, section 3.2).

`attend` is the kernels' form, `reference` the plain one of the same signature. Queries come scaled: by the temperature
of their head, with QK-norm, else by the root of the head dim; so the kernels know of neither.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fot import attention, ring
from fot.attention import Partial, Tokens
from fot.kernels import passes
from fot.kernels.blocks import Blocks, blocks_of, heads_first
from fot.kernels.passes import Keys
from fot.kernels.plan import Plan, make_plan
from fot.ring import Trip


class Joint(NamedTuple):
    """Attention to the local context and to contexts, in one softmax.

    Attributes:
      out: [A, T, N, H], of the queries' dtype; zeros where nothing is visible.
      lse: [A, T, N] float32, log-sum-exp of all logits; -inf where nothing is visible.
      local_lse: [A, T, N] float32, of the local context's alone. No gradient comes through it.
    """

    out: jax.Array
    lse: jax.Array
    local_lse: jax.Array

    @property
    def share(self) -> jax.Array:
        """[A, T, N] float32, the weight that all contexts have together."""
        return jnp.where(self.lse == -jnp.inf, 0.0, -jnp.expm1(self.local_lse - attention.finite(self.lse)))


def plan(
    contexts_AC: np.ndarray,
    negative_AC: np.ndarray,
    rows: int,
    length: int,
    block: int,
    shards: int = 1,
    local: bool = True,
) -> Plan:
    """Returns what `attend` needs to know of a row table.

    Args:
      contexts_AC: int32, row whose whole context the row sees in this column, numbered within the shard; -1 is none.
      negative_AC: bool, whether tokens of other documents are visible in this column.
      rows: that the contexts are of, on each shard.
      length: of a row, in tokens.
      block: at most so many tokens of a row are dealt with at once; on a TPU a multiple of 128.
      shards: over which rows are split evenly; the leading axis of all arrays of the plan is to be split over them.
      local: whether rows see their local context, too.
    """
    return make_plan(contexts_AC, negative_AC, rows, blocks_of(length, block)[1], shards, local)


def attend(
    q_ATNH: jax.Array, near: Keys, far: Keys, queries: Tokens, tokens: Tokens, plan: Plan, block: int, interpret
) -> Joint:
    """`attend_around` of one device, which has all rows; `plan` is of all contexts."""
    return attend_around(q_ATNH, near, far, queries, tokens, (plan,), ring.Trip(1, 1, (0,)), block, interpret)


def attend_around(
    q_ATNH: jax.Array,
    near: Keys,
    far: Keys,
    queries: Tokens,
    tokens: Tokens,
    plans: tuple[Plan, ...],
    trip: Trip,
    block: int,
    interpret,
) -> Joint:
    """Attention of each row to itself, causal and within documents, and to the contexts that its table names.

    Neither logits nor gathered contexts exist outside the kernels, forward or backward. Sums over stops of the trip are
    of kernels' results, which are of the inputs' dtype.

    Args:
      q_ATNH: queries, already scaled.
      near: local keys and values [A, T, G, H], as the row itself sees them; G divides N.
      far: keys and values [B, T, G, H] of the device's own rows, as other rows see them.
      queries: [A, T], tokens of the queries and of the local keys, in the order of the row.
      tokens: [B, T], tokens of the contexts.
      plans: of what the rows see at each stop, for this length and block; the first has their local context, too.
      trip: where contexts are.
      block: as for `plan`.
      interpret: run without a TPU.
    """
    chex.assert_equal_shape([near.keys, near.values])
    chex.assert_equal_shape([far.keys, far.values])
    T = q_ATNH.shape[1]
    length, count = blocks_of(T, block)
    blocks = Blocks(length, count, interpret)
    pad = length * count - T

    def both(tokens):
        documents = jnp.pad(tokens.documents, ((0, 0), (0, pad)), constant_values=-1)
        return jnp.stack([documents, jnp.pad(tokens.positions, ((0, 0), (0, pad)))], axis=1)

    q, near, far = jax.tree.map(lambda x: heads_first(x, pad), (q_ATNH, near, far))
    out, lse, local_lse = _attend(q, near, far, both(queries), both(tokens), plans, trip, blocks)
    return Joint(
        out.swapaxes(1, 2)[:, :T], lse.swapaxes(1, 2)[:, :T], jax.lax.stop_gradient(local_lse).swapaxes(1, 2)[:, :T]
    )


class _Held(NamedTuple):
    """A shard's keys and values [B, G, T, H], and its tokens [B, 2, T]."""

    far: Keys
    tokens: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, near, far, queries, keys, plans, trip, blocks):
    """q [A, N, T, H], near [A, G, T, H], far [B, G, T, H], tokens [rows, 2, T]; gives out and both log-sum-exps."""

    def visit(before, held: _Held, stop: int):
        done = passes.forward(q, near, held.far, queries, held.tokens, plans[stop].queries, blocks)
        part, near_lse = Partial(done.out, done.lse[:, :, 0]), done.near_lse[:, :, 0]
        return (part, near_lse) if stop == 0 else (attention.merge(before[0], part), before[1])

    part, near_lse = ring.go(trip, None, _Held(far, keys), visit)
    return part.out.astype(q.dtype), part.lse, near_lse


def _attend_forward(q, near, far, queries, keys, plans, trip, blocks):
    out, lse, near_lse = checkpoint_name(_attend(q, near, far, queries, keys, plans, trip, blocks), attention.OUTPUT)
    return (out, lse, near_lse), (q, near, far, queries, keys, plans, out, lse)


def _attend_backward(trip, blocks, saved, cotangents):
    q, near, far, queries, keys, plans, out, lse = saved
    dout, dlse, _ = cotangents
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse
    dout, sums = dout.astype(q.dtype), jnp.stack([attention.finite(lse), delta], axis=2)
    wide = _float32 if len(trip.offsets) > 1 else lambda tree: tree  # sums over stops

    def visit(before, held: _Held, stop: int):
        plan, rest = plans[stop], (dout, sums)
        dq = wide(passes.query_gradients(q, near, held.far, queries, held.tokens, *rest, plan.queries, blocks))
        dfar = wide(passes.key_gradients(q, held.far, queries, held.tokens, *rest, plan.far, blocks))
        return dq if stop == 0 else before + dq, dfar

    dq, dfar = ring.go_back(trip, None, _Held(far, keys), visit)
    dnear = passes.key_gradients(q, near, queries, queries, dout, sums, plans[0].near, blocks)
    dfar = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), dfar, far)
    return dq.astype(q.dtype), dnear, dfar, None, None, None


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


_attend.defvjp(_attend_forward, _attend_backward)


def reference(
    q_ATNH: jax.Array, near: Keys, far: Keys, queries: Tokens, tokens: Tokens, plan: Plan, block: int, interpret
) -> Joint:
    """`attend` by the formula: gathers all contexts, forms all logits; `block` and `interpret` mean nothing to it."""
    A, T, N, H = q_ATNH.shape
    G = near.keys.shape[2]
    none_A = jnp.zeros(A, bool)
    rows_AC = jnp.maximum(plan.contexts_AC, 0)
    columns = [(near, attention.visible(queries, queries, none_A))]
    for column, rows_A in enumerate(rows_AC.T):
        there = Tokens(*(x[rows_A] for x in tokens))
        seen = attention.visible(queries, there, jnp.asarray(plan.negative_AC)[:, column])
        seen &= jnp.asarray(plan.contexts_AC)[:, column, None, None] >= 0
        columns.append((Keys(*(x[rows_A] for x in far)), seen))
    q_ATGRH = q_ATNH.reshape(A, T, G, N // G, H)
    s = [
        jnp.where(
            seen[:, :, None, None],
            jnp.einsum("atgrh,asgh->atgrs", q_ATGRH, k, preferred_element_type=jnp.float32),
            -jnp.inf,
        )
        for (k, _), seen in columns
    ]
    local_lse, lse = _logsumexp(s[0]), _logsumexp(jnp.concatenate(s, -1))
    out = sum(
        jnp.einsum(
            "atgrs,asgh->atgrh",
            jnp.exp(each - attention.finite(lse)[..., None]).astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        for each, ((_, v), _) in zip(s, columns, strict=True)
    )
    shape = A, T, N
    return Joint(
        out.reshape(q_ATNH.shape).astype(q_ATNH.dtype),
        lse.reshape(shape),
        jax.lax.stop_gradient(local_lse).reshape(shape),
    )


def _logsumexp(s: jax.Array) -> jax.Array:
    """Of the last axis; -inf where all is, and then without a gradient that isn't a number."""
    top = jax.lax.stop_gradient(attention.finite(s.max(-1)))
    total = jnp.exp(s - top[..., None]).sum(-1)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)
