"""The kernels of crossbatch attention: one for the forward pass, one for the gradient of queries, one for that of keys.

Each runs down a list of `fot.kernels.plan`. What stays with a kernel lies along sublanes, what passes by along lanes:
so running sums are columns, and every product is one that the matrix unit takes as it is. Logits live in VMEM, one
block of queries by one block of keys at a time; the backward kernels form them anew, from the log-sum-exp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fot.kernels.arithmetic import (
    MASKED,
    Softmax,
    as_columns,
    inner,
    logit_gradients,
    outer,
    softmax_scratch,
    two,
    visible,
)
from fot.kernels.blocks import Blocks, Where
from fot.kernels.plan import FIRST, JOINT, KIND, LAST, NEAR, ByKey, ByQuery


class Keys(NamedTuple):
    """Keys and values, [rows, G, T, H]."""

    keys: jax.Array
    values: jax.Array


class Results(NamedTuple):
    """Of the forward kernel: out [A, N, T, H]; log-sum-exp of all, and of the local context alone, [A, N, 1, T]."""

    out: jax.Array
    lse: jax.Array
    near_lse: jax.Array


def forward(q: jax.Array, near: Keys, far: Keys, queries: jax.Array, keys: jax.Array, steps: ByQuery, blocks: Blocks):
    """Attention of queries [A, N, T, H] to local keys [A, G, T, H] and to those of contexts [B, G, T, H].

    Args:
      q: scaled queries.
      near: local keys and values.
      far: those of contexts.
      queries: [A, 2, T] int32, documents and positions of the queries and of the local keys.
      keys: [B, 2, T] int32, those of the contexts.
      steps: the list.
      blocks: how T is cut.

    Returns:
      Results.
    """
    A, N, T, H = q.shape
    query, local, context = _by_query(N // near.keys.shape[1])
    numbers = jax.ShapeDtypeStruct((A, N, 1, T), jnp.float32)
    call = blocks.call(
        _forward,
        grid=(N, len(steps.flags)),
        lists=len(steps),
        products=2,
        like=q,
        in_specs=[*_inputs(blocks, H, query, local, context), blocks.heads(H, query)],
        out_specs=[blocks.heads(H, query), blocks.numbers(1, query), blocks.numbers(1, query)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), numbers, numbers],
        scratch_shapes=[
            pltpu.VMEM((blocks.length, 2), jnp.int32),
            *softmax_scratch(blocks.length, H),
        ],
    )
    return Results(*call(*steps, queries, queries, keys, *near, *far, q))


def _by_query(heads: int) -> tuple[Where, Where, Where]:
    """Where the queries, local keys and contexts of a step are, with so many query heads a key head."""
    return (
        lambda head, step, queries, near, far, flags: (queries[step], head),
        lambda head, step, queries, near, far, flags: (near[step], head // heads),
        lambda head, step, queries, near, far, flags: (far[step], head // heads),
    )


def _inputs(blocks: Blocks, H: int, query: Where, local: Where, context: Where) -> list[pl.BlockSpec]:
    return [
        *(blocks.tokens(where) for where in (query, local, context)),
        *(blocks.heads(H, where) for where in (local, local, context, context)),
    ]


def _forward(
    _, __, ___, flags, tokens, near_tokens, far_tokens, near_k, near_v, far_k, far_v, q, out, lse, near_lse, *scratch
):
    flag = flags[pl.program_id(1)]
    columns, softmax = scratch[0], Softmax(*scratch[1:])

    @pl.when(flag & FIRST > 0)
    def _():
        columns[...] = as_columns(tokens[...])
        softmax.start()

    def take(k, v, keys):
        seen = visible(two(columns[...], 1), two(keys[...], 0), flag)
        softmax.take(jnp.where(seen, outer(q[...], k[...]), MASKED), v[...])

    pl.when(flag & KIND == NEAR)(lambda: take(near_k, near_v, near_tokens))
    pl.when(flag & KIND > NEAR)(lambda: take(far_k, far_v, far_tokens))

    @pl.when(flag & JOINT > 0)
    def _():
        near_lse[...] = softmax.lse()

    @pl.when(flag & LAST > 0)
    def _():
        out[...] = softmax.out().astype(out.dtype)
        lse[...] = softmax.lse()


def query_gradients(
    q, near: Keys, far: Keys, queries, keys, dout: jax.Array, sums: jax.Array, steps: ByQuery, blocks: Blocks
) -> jax.Array:
    """Gradient of the queries; arguments as in `forward`, and

    Args:
      dout: [A, N, T, H], gradient of out.
      sums: [A, N, 2, T] float32, log-sum-exp, finite, and the inner product of out and its gradient, less the gradient
        of the log-sum-exp.

    Returns:
      [A, N, T, H], of the queries' dtype.
    """
    N, H = q.shape[1], q.shape[-1]
    query, local, context = _by_query(N // near.keys.shape[1])
    call = blocks.call(
        _query_gradients,
        grid=(N, len(steps.flags)),
        lists=len(steps),
        products=3,
        like=q,
        in_specs=[
            *_inputs(blocks, H, query, local, context),
            blocks.heads(H, query),
            blocks.heads(H, query),
            blocks.numbers(2, query),
        ],
        out_specs=blocks.heads(H, query),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[
            pltpu.VMEM((blocks.length, 2), jnp.int32),
            pltpu.VMEM((blocks.length, 2), jnp.float32),
            pltpu.VMEM((blocks.length, H), jnp.float32),
        ],
    )
    return call(*steps, queries, queries, keys, *near, *far, q, dout, sums)


def _query_gradients(
    _, __, ___, flags, tokens, near_tokens, far_tokens, near_k, near_v, far_k, far_v, q, dout, sums, dq, *scratch
):
    flag = flags[pl.program_id(1)]
    columns, sum_columns, total = scratch

    @pl.when(flag & FIRST > 0)
    def _():
        columns[...] = as_columns(tokens[...])
        sum_columns[...] = as_columns(sums[...])
        total[...] = jnp.zeros(total.shape)

    def take(k, v, keys):
        seen = visible(two(columns[...], 1), two(keys[...], 0), flag)
        products = outer(q[...], k[...]), outer(dout[...], v[...])
        _, ds = logit_gradients(*products, seen, *two(sum_columns[...], 1))
        total[...] += inner(ds.astype(k.dtype), k[...])

    pl.when(flag & KIND == NEAR)(lambda: take(near_k, near_v, near_tokens))
    pl.when(flag & KIND > NEAR)(lambda: take(far_k, far_v, far_tokens))

    @pl.when(flag & LAST > 0)
    def _():
        dq[...] = total[...].astype(dq.dtype)


def key_gradients(q, read: Keys, queries, keys, dout: jax.Array, sums: jax.Array, steps: ByKey, blocks: Blocks) -> Keys:
    """Gradients of keys and values, local ones or those of contexts, as `steps` says.

    Args:
      q: [A, N, T, H], scaled queries.
      read: keys and values [rows, G, T, H].
      queries: [A, 2, T] int32, documents and positions of the queries.
      keys: [rows, 2, T] int32, those of the keys.
      dout: as in `query_gradients`.
      sums: as in `query_gradients`.
      steps: the list.
      blocks: how T is cut.
    """
    N, G, H = q.shape[1], read.keys.shape[1], q.shape[-1]
    heads = N // G

    def key(group, step, head, keys, queries, flags):
        return keys[step], group

    def query(group, step, head, keys, queries, flags):
        return queries[step], group * heads + head

    call = blocks.call(
        _key_gradients,
        grid=(G, len(steps.flags), heads),
        lists=len(steps),
        products=4,
        like=q,
        in_specs=[
            blocks.tokens(query),
            blocks.tokens(key),
            blocks.heads(H, key),
            blocks.heads(H, key),
            blocks.heads(H, query),
            blocks.heads(H, query),
            blocks.numbers(2, query),
        ],
        out_specs=[blocks.heads(H, key), blocks.heads(H, key)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in read],
        scratch_shapes=[
            pltpu.VMEM((blocks.length, 2), jnp.int32),
            pltpu.VMEM((blocks.length, H), jnp.float32),
            pltpu.VMEM((blocks.length, H), jnp.float32),
        ],
    )
    return Keys(*call(*steps, queries, keys, *read, q, dout, sums))


def _key_gradients(_, __, flags, tokens, keys, k, v, q, dout, sums, dk, dv, columns, k_total, v_total):
    flag, head, heads = flags[pl.program_id(1)], pl.program_id(2), pl.num_programs(2)

    @pl.when((flag & FIRST > 0) & (head == 0))
    def _():
        columns[...] = as_columns(keys[...])
        k_total[...] = jnp.zeros(k_total.shape)
        v_total[...] = jnp.zeros(v_total.shape)

    @pl.when(flag & KIND > 0)
    def _():
        # Logits and all that comes of them are transposed here: [S, T].
        seen = visible(two(tokens[...], 0), two(columns[...], 1), flag)
        products = outer(k[...], q[...]), outer(v[...], dout[...])
        p, ds = logit_gradients(*products, seen, *two(sums[...], 0))
        v_total[...] += inner(p.astype(dout.dtype), dout[...])
        k_total[...] += inner(ds.astype(q.dtype), q[...])

    @pl.when((flag & LAST > 0) & (head == heads - 1))
    def _():
        dk[...] = k_total[...].astype(dk.dtype)
        dv[...] = v_total[...].astype(dv.dtype)
