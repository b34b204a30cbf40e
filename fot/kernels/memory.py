"""Attention to a memory of any length, in one pass over it (flash decoding).

`attend` is the kernel's form, `reference` the plain one of the same signature. A block of queries, those of all heads
that share a key head, stays while the blocks of slots pass by, those alone in which some slot is in use: a list, read
by scalar prefetch, names them. No logits exist outside the kernel, and a bfloat16 memory is never converted outside it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fot import attention
from fot.kernels.arithmetic import MASKED, Softmax, as_columns, outer, softmax_scratch
from fot.kernels.blocks import blocks_of
from fot.memory import Stack

BLOCK = 512, 4096  # so many queries keep the matrix unit busy; with few, so many slots make a step worth its overhead
_LOGITS = 2**19  # of a block of queries by a block of slots, at most: 2 MiB
_BYTES = 2**20  # of a block of keys, at most
_LANES = 128


class Read(NamedTuple):
    """What queries got from a memory.

    Attributes:
      out: [B, G, Q, H] float32, zeros where nothing is visible.
      lse: [B, G, Q] float32, log-sum-exp of the logits; -inf where nothing is visible.
    """

    out: jax.Array
    lse: jax.Array


def attend(
    q_BGQH: jax.Array,
    documents_BQ: jax.Array,
    stack: Stack,
    documents_BM: jax.Array,
    multi_doc: bool,
    interpret,
    block: tuple[int, int] = BLOCK,
) -> Read:
    """Attention of one device's queries to all visible slots of its memory. It has no gradient.

    Args:
      q_BGQH: queries, scaled; those of a key head are those of all its query heads and tokens.
      documents_BQ: int32, the queries' documents.
      stack: keys and values [L, B, G, M, H] of any float dtype, and which layer is read.
      documents_BM: int32, documents of the slots; -1 is an empty one.
      multi_doc: whether queries see slots of other documents than their own.
      interpret: run without a TPU; or how.
      block: queries and slots that the kernel has at once, at most; on a TPU multiples of 128.
    """
    B, G, Q, H = q_BGQH.shape
    M = documents_BM.shape[1]
    if M == 0:
        return Read(jnp.zeros(q_BGQH.shape, jnp.float32), jnp.full((B, G, Q), -jnp.inf))
    length, count = blocks_of(Q, block[0])
    size = _size(stack.keys, length, block[1])
    order, used = _used(documents_BM, size)
    pad = length * count - Q
    q_BGQH = jnp.pad(q_BGQH, ((0, 0), (0, 0), (0, pad), (0, 0)))
    documents_BQ = jnp.pad(documents_BQ, ((0, 0), (0, pad)), constant_values=-1)

    def queries(row, head, block, step, layer, order, used):
        return row, head, block, 0

    def numbers(row, head, block, step, layer, order, used):
        return row, head, 0, block

    def place(row, step, order):
        return order[row * pl.num_programs(3) + step]

    def keys(row, head, block, step, layer, order, used):
        return layer[0], row, head, place(row, step, order), 0

    steps = -(-M // size)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, slots=M, multi_doc=multi_doc),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, G, count, steps),
            in_specs=[
                pl.BlockSpec((None, None, length, H), queries),
                pl.BlockSpec((None, 1, length), lambda row, head, block, *_: (row, 0, block)),
                pl.BlockSpec((None, None, None, size, H), keys),
                pl.BlockSpec((None, None, None, size, H), keys),
                pl.BlockSpec(
                    (None, 1, size), lambda row, head, block, step, _, order, __: (row, 0, place(row, step, order))
                ),
            ],
            out_specs=[pl.BlockSpec((None, None, length, H), queries), pl.BlockSpec((None, None, 1, length), numbers)],
            scratch_shapes=softmax_scratch(length, H),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BGQH.shape, jnp.float32),
            jax.ShapeDtypeStruct((B, G, 1, length * count), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * q_BGQH.size * M,
            transcendentals=q_BGQH.size // H * M,
            bytes_accessed=2 * count * math.prod(stack.keys.shape[1:]) * stack.keys.dtype.itemsize,  # all slots in use
        ),
        interpret=interpret,
        name="memory",
    )(
        jnp.asarray(stack.layer, jnp.int32).reshape(1),
        order,
        used,
        q_BGQH,
        documents_BQ[:, None],
        stack.keys,
        stack.values,
        documents_BM[:, None],
    )
    return Read(out[:, :, :Q], lse[:, :, 0, :Q])


def _size(keys_LBGMH: jax.Array, queries: int, most: int) -> int:
    """Returns the slots of a block: all, or as many as fit beside so many queries."""
    M, H = keys_LBGMH.shape[3:]
    bytes_of_slot = -(-H // _LANES) * _LANES * keys_LBGMH.dtype.itemsize
    most = min(most, _LOGITS // queries, _BYTES // bytes_of_slot)
    return M if most >= M else max(most - most % _LANES, min(most, _LANES))


def _used(documents_BM: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks of each row in which a slot is in use, the last one repeated, and how many these are.

    The same block isn't fetched twice.
    """
    B, M = documents_BM.shape
    steps = -(-M // size)
    documents = jnp.pad(documents_BM, ((0, 0), (0, steps * size - M)), constant_values=-1)
    used = (documents.reshape(B, steps, size) >= 0).any(2)
    order, count = jnp.argsort(~used, axis=1, stable=True), used.sum(1)
    place = jnp.minimum(jnp.arange(steps), jnp.maximum(count, 1)[:, None] - 1)
    return jnp.take_along_axis(order, place, 1).astype(jnp.int32).reshape(-1), count.astype(jnp.int32)


def _kernel(
    _, order, used, q, documents, keys, values, slot_documents, out, lse, *scratch, slots: int, multi_doc: bool
):
    row, step, size = pl.program_id(0), pl.program_id(3), keys.shape[0]
    steps = pl.num_programs(3)
    first = order[row * steps + step] * size
    softmax = Softmax(*scratch)

    pl.when(step == 0)(softmax.start)

    def within(shape: tuple[int, int], axis: int) -> jax.Array:
        return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < slots

    @pl.when(step < used[row])
    def _():
        k, v, there = keys[...], values[...], slot_documents[...]
        seen = there >= 0
        if slots % size:  # what lies past the last slot is anything
            seen &= within((1, size), 1)
            v = jnp.where(within((size, 1), 0), v, 0)
        if not multi_doc:
            seen &= as_columns(documents[...]) == there
        dtype = jnp.promote_types(q.dtype, k.dtype)
        softmax.take(jnp.where(seen, outer(q[...].astype(dtype), k.astype(dtype)), MASKED), v)

    @pl.when(step == steps - 1)
    def _():
        out[...] = softmax.out()
        lse[...] = softmax.lse()


def reference(
    q_BGQH: jax.Array,
    documents_BQ: jax.Array,
    stack: Stack,
    documents_BM: jax.Array,
    multi_doc: bool,
    interpret,
    block: tuple[int, int] = BLOCK,
) -> Read:
    """`attend` by the formula: forms all logits; `interpret` and `block` mean nothing to it."""
    there = documents_BM[:, None]
    seen = (there >= 0) if multi_doc else (there >= 0) & (there == documents_BQ[..., None])
    keys, values = stack.keys[stack.layer], stack.values[stack.layer]
    s = jnp.einsum("bgqh,bgmh->bgqm", q_BGQH, keys, preferred_element_type=jnp.float32)
    s = jnp.where(seen[:, None], s, -jnp.inf)
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.exp(s - attention.finite(lse)[..., None])
    out = jnp.einsum("bgqm,bgmh->bgqh", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Read(out, lse)
