"""Exact attention in parts: rotary positions, partial attention, and its joint softmax.

Axis legend of every array name in the package:
  B rows, T queries, S keys, M memory slots, C contexts, K neighbours, D model, N heads, G key/value heads,
  R query heads per key/value head (N = G·R), H head dim, F feed-forward, V vocabulary, L layers.

Attention over a union of key sets is computed set by set: each gives a `Partial`, its normalised output with the
log-sum-exp of its logits, and `merge` joins any number of them into the softmax over the union. Local context,
crossbatch contexts and memories all return a `Partial`, so none of them knows of the others.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fot import device
from fot.config import RopeScalingConfig
from fot.config.mesh import MESH_AXES

OUTPUT = "attention"  # for remat policies: what attention gave; with it and q, k, v kept, nothing of it runs again


class Partial(NamedTuple):
    """Attention over one set of keys.

    Attributes:
      out: [B, T, N, H] float32, values averaged under the softmax over this set; zeros where it has no visible key.
      lse: [B, T, N] float32, log-sum-exp of this set's logits; -inf where it has no visible key.
    """

    out: jax.Array
    lse: jax.Array


class Tokens(NamedTuple):
    """Which token a query or key stands for; decides who sees whom.

    Attributes:
      documents: [B, T] int32, number of the token's document; -1 is no token (padding, an empty slot).
      positions: [B, T] int32, index of the token in its document.
    """

    documents: jax.Array
    positions: jax.Array


def visible(queries: Tokens, keys: Tokens, others_B: jax.Array) -> jax.Array:
    """Tells which keys each query may see: its own document's up to itself and, in rows with `others`, all others'.

    Args:
      queries: tokens [B, T].
      keys: tokens [B, S].
      others_B: [B] bool, whether keys of other documents are visible.

    Returns:
      [B, T, S] bool.
    """
    same_BTS = queries.documents[:, :, None] == keys.documents[:, None, :]
    earlier_BTS = keys.positions[:, None, :] <= queries.positions[:, :, None]
    return jnp.where(same_BTS, earlier_BTS, others_B[:, None, None]) & (keys.documents >= 0)[:, None, :]


UNSCALED = RopeScalingConfig()


def _stretch_llama3(frequencies_H: jax.Array, scaling: RopeScalingConfig) -> jax.Array:
    turns_H = scaling.original_context * frequencies_H / (2 * jnp.pi)
    kept_H = (turns_H - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    kept_H = jnp.clip(kept_H, 0.0, 1.0)
    return frequencies_H * (kept_H + (1 - kept_H) / scaling.factor)


_STRETCHES: dict[str, Callable[[jax.Array, RopeScalingConfig], jax.Array]] = {
    "none": lambda frequencies_H, scaling: frequencies_H,
    "linear": lambda frequencies_H, scaling: frequencies_H / scaling.factor,
    "llama3": _stretch_llama3,
}


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, scaling: RopeScalingConfig = UNSCALED) -> jax.Array:
    """Rotates pairs (h, h + H/2) of each head by position · theta^(-2h/H), stretched as `scaling` says.

    The layout, and what a scaling means, are those of Hugging Face LLaMA.
    """
    half = x_BTNH.shape[-1] // 2
    frequencies_H = _STRETCHES[scaling.kind](theta ** (-jnp.arange(half, dtype=jnp.float32) / half), scaling)
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies_H
    sin, cos = jnp.sin(angles_BTH)[:, :, None], jnp.cos(angles_BTH)[:, :, None]
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BTNH.dtype)


def sharpen(q_BTNH: jax.Array, keys_B: jax.Array, known: int) -> jax.Array:
    """Scales queries by log n / log `known` in rows with more than `known` keys n in view (Chiang and Cholak, 2022).

    The softmax over n keys gets flatter as n grows; so its logits grow with it. A `known` of 0 changes nothing.
    """
    if known == 0:
        return q_BTNH
    scale_B = jnp.log(jnp.maximum(keys_B, known).astype(jnp.float32) / known) / math.log(known) + 1
    return (q_BTNH * scale_B[:, None, None, None]).astype(q_BTNH.dtype)


def merge(*parts: Partial) -> Partial:
    """Joins partial attentions over disjoint key sets into the one softmax over their union.

    A part without visible keys (lse -inf) changes no bit of the result.
    """
    first, *rest = parts
    for part in rest:
        top = finite(jnp.maximum(first.lse, part.lse))
        left, right = jnp.exp(first.lse - top), jnp.exp(part.lse - top)
        total = left + right
        safe = jnp.where(total > 0, total, 1.0)
        out = (first.out * left[..., None] + part.out * right[..., None]) / safe[..., None]
        first = Partial(out, top + jnp.log(total))
    return first


def finite(x: jax.Array) -> jax.Array:
    """Returns x with -inf replaced by 0, the reference point of an empty softmax."""
    return jnp.where(x == -jnp.inf, 0.0, x)


# Block arithmetic in head-major layout: queries [B, G, R, T, H], keys and values [B, G, S, H], visibility [B, T, S].


def split_heads(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] → [B, G, R, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def join_heads(x_BGRTH: jax.Array) -> jax.Array:
    """[B, G, R, T, H] → [B, T, N, H]."""
    B, G, R, T, H = x_BGRTH.shape
    return x_BGRTH.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, H)


def logits(q_BGRTH: jax.Array, k_BGSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Scaled inner products [B, G, R, T, S] in float32, -inf where a key is not visible."""
    s_BGRTS = jnp.einsum("bgrth,bgsh->bgrts", q_BGRTH, k_BGSH, preferred_element_type=jnp.float32)
    return jnp.where(visible_BTS[:, None, None], s_BGRTS, -jnp.inf)


class Running(NamedTuple):
    """A softmax under way: running maximum and sum [B, G, R, T], unnormalised output [B, G, R, T, H]."""

    top: jax.Array
    total: jax.Array
    out: jax.Array


def accumulate(running: Running, s_BGRTS: jax.Array, v_BGSH: jax.Array) -> Running:
    """Takes another block of logits and values into a running softmax."""
    top = jnp.maximum(running.top, s_BGRTS.max(-1))
    reference = finite(top)
    p_BGRTS = jnp.exp(s_BGRTS - reference[..., None])
    shrink = jnp.exp(running.top - reference)
    out = jnp.einsum("bgrts,bgsh->bgrth", p_BGRTS.astype(v_BGSH.dtype), v_BGSH, preferred_element_type=jnp.float32)
    return Running(top, running.total * shrink + p_BGRTS.sum(-1), running.out * shrink[..., None] + out)


def start(q_BGRTH: jax.Array) -> Running:
    """The running softmax over no keys."""
    shape = q_BGRTH.shape[:-1]
    return Running(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(q_BGRTH.shape, jnp.float32))


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """Returns normalised output [B, G, R, T, H] and log-sum-exp [B, G, R, T]."""
    safe = jnp.where(running.total > 0, running.total, 1.0)
    return running.out / safe[..., None], finite(running.top) + jnp.log(running.total)


_FEW = 8  # queries per key/value head, at the most, that `attend_few` is the faster way for
_FEW_LOGITS = 2**24  # numbers that it may hold at once, 64 MiB


def few(q_BGRTH: jax.Array, k_BGSH: jax.Array) -> bool:
    """Tells whether these queries are few enough, for these keys, for `attend_few`.

    XLA's CPU backend would convert all of bfloat16 keys to float32 at once.
    """
    numbers = q_BGRTH.size // q_BGRTH.shape[-1] * k_BGSH.shape[2]
    return math.prod(q_BGRTH.shape[2:4]) <= _FEW and numbers <= _FEW_LOGITS and k_BGSH.dtype == jnp.float32


def attend_few(q_BGRTH: jax.Array, k_BGSH: jax.Array, v_BGSH: jax.Array, visible_BTS: jax.Array) -> Running:
    """The running softmax of few queries over many keys, which are read once and where they lie.

    Keys come first in the product and its other operand has two rows at least: else XLA's CPU backend runs it element
    by element, ten times slower. A block would be copied before it is read.
    """
    s_BGSRT = jnp.einsum("bgsh,bgrth->bgsrt", k_BGSH, q_BGRTH, preferred_element_type=jnp.float32)
    s_BGRTS = jnp.where(visible_BTS[:, None, None], jnp.moveaxis(s_BGSRT, 2, 4), -jnp.inf)
    top = s_BGRTS.max(-1)
    p_BGRTS = jnp.exp(s_BGRTS - finite(top)[..., None])
    rows = p_BGRTS.astype(v_BGSH.dtype).reshape(*p_BGRTS.shape[:2], -1, p_BGRTS.shape[-1])
    if rows.shape[2] == 1:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 1), (0, 0)))
    out = jnp.einsum("bgns,bgsh->bgnh", rows, v_BGSH, preferred_element_type=jnp.float32)
    return Running(top, p_BGRTS.sum(-1), out[:, :, : math.prod(q_BGRTH.shape[2:4])].reshape(q_BGRTH.shape))


class Gradients(NamedTuple):
    """Cotangents of a block's queries [B, G, R, T, H], keys and values [B, G, S, H], in float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def block_gradients(q_BGRTH, k_BGSH, v_BGSH, visible_BTS, lse_BGRT, delta_BGRT, dout_BGRTH) -> Gradients:
    """Backward pass of one block, from the joint log-sum-exp; probabilities are recomputed, not stored.

    delta is the inner product of out and its cotangent, less the cotangent of the log-sum-exp.
    """
    dtype = v_BGSH.dtype
    p = jnp.exp(logits(q_BGRTH, k_BGSH, visible_BTS) - finite(lse_BGRT)[..., None])
    dout = dout_BGRTH.astype(dtype)
    dp = jnp.einsum("bgrth,bgsh->bgrts", dout, v_BGSH, preferred_element_type=jnp.float32)
    ds = (p * (dp - delta_BGRT[..., None])).astype(dtype)
    # Keys' and values' gradients come out transposed, so that it is not the logits that have to be transposed.
    f32 = jnp.float32
    return Gradients(
        q=jnp.einsum("bgrts,bgsh->bgrth", ds, k_BGSH, preferred_element_type=f32),
        k=_transpose(jnp.einsum("bgrth,bgrts->bghs", q_BGRTH, ds, preferred_element_type=f32), dtype),
        v=_transpose(jnp.einsum("bgrth,bgrts->bghs", dout, p.astype(dtype), preferred_element_type=f32), dtype),
    )


def _transpose(product_BGHS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, G, H, S] → [B, G, S, H], of a product of arrays of that dtype.

    XLA would fold the transposition into the product, and its CPU backend can't run that one in bfloat16.
    """
    if dtype != jnp.float32:
        product_BGHS = jax.lax.optimization_barrier(product_BGHS)
    return product_BGHS.swapaxes(2, 3)


_CACHE_LOGITS = 2**20  # 4 MiB of them, which stay in a CPU's cache from one operation to the next


def _by_heads(f: Callable, arrays: tuple[jax.Array, ...], block: int) -> tuple[jax.Array, ...]:
    """Returns f(*arrays), where every array is [B, G, …]; on a CPU, of few heads after few others.

    As many at once as have logits that stay in its cache, of `block` queries; all where a mesh splits the heads.
    """
    (B, G, R, T), mesh = arrays[0].shape[:4], jax.sharding.get_abstract_mesh()
    if device.platform() != "cpu" or (not mesh.empty and mesh.shape.get(MESH_AXES["kv_heads"], 1) > 1):
        return f(*arrays)
    most = max(1, _CACHE_LOGITS // (B * R * min(block, T) * T))
    count = max(n for n in range(1, G + 1) if G % n == 0 and n <= most)
    if count == G:
        return f(*arrays)
    parts = tuple(jnp.moveaxis(x.reshape(B, G // count, count, *x.shape[2:]), 1, 0) for x in arrays)
    done = jax.lax.map(lambda part: f(*part), parts)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, G, *x.shape[3:]) for x in done)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(q_BGRTH, k_BGSH, v_BGSH, tokens, block):
    return _by_heads(functools.partial(_causal_heads, tokens=tokens, block=block), (q_BGRTH, k_BGSH, v_BGSH), block)


def _causal_heads(q_BGRTH, k_BGSH, v_BGSH, *, tokens, block):
    T = q_BGRTH.shape[3]
    nobody_B = jnp.zeros(q_BGRTH.shape[0], bool)
    outs, lses = [], []
    for i in range(0, T, block):
        here, past = slice(i, i + block), slice(0, min(i + block, T))
        mask = visible(_cut(tokens, here), _cut(tokens, past), nobody_B)
        s = logits(q_BGRTH[..., here, :], k_BGSH[..., past, :], mask)
        out, lse = finish(accumulate(start(q_BGRTH[..., here, :]), s, v_BGSH[..., past, :]))
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _cut(tokens: Tokens, part: slice) -> Tokens:
    return Tokens(tokens.documents[:, part], tokens.positions[:, part])


def _causal_forward(q, k, v, tokens, block):
    out, lse = checkpoint_name(_causal(q, k, v, tokens, block), OUTPUT)
    return (out, lse), (q, k, v, tokens, out, lse)


def _causal_backward(block, saved, cotangents):
    q, k, v, tokens, out, lse = saved
    dout, dlse = cotangents
    delta = (dout * out).sum(-1) - dlse
    backward = functools.partial(_causal_heads_backward, tokens=tokens, block=block)
    return *_by_heads(backward, (q, k, v, lse, delta, dout), block), None


def _causal_heads_backward(q, k, v, lse, delta, dout, *, tokens, block):
    T = q.shape[3]
    nobody_B = jnp.zeros(q.shape[0], bool)
    dqs = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for i in range(0, T, block):
        here, past = slice(i, i + block), slice(0, min(i + block, T))
        mask = visible(_cut(tokens, here), _cut(tokens, past), nobody_B)
        g = block_gradients(
            q[..., here, :],
            k[..., past, :],
            v[..., past, :],
            mask,
            lse[..., here],
            delta[..., here],
            dout[..., here, :],
        )
        dqs.append(g.q)
        dk, dv = dk.at[..., past, :].add(g.k), dv.at[..., past, :].add(g.v)
    dq = jnp.concatenate(dqs, axis=3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_causal.defvjp(_causal_forward, _causal_backward)


@jax.named_scope("local_attention")
def attend_local(q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, tokens: Tokens, block: int) -> Partial:
    """Causal attention of each row to itself, within documents.

    Logits exist for `block` queries at a time, forward and backward, and only for keys up to the block's end.

    Args:
      q_BTNH: queries, already scaled.
      k_BTGH: keys; G divides N.
      v_BTGH: values.
      tokens: [B, T], in the order of the row.
      block: queries per block, in tokens.

    Returns:
      Partial attention over the local context.
    """
    q, k, v = split_heads(q_BTNH, k_BTGH.shape[2]), k_BTGH.swapaxes(1, 2), v_BTGH.swapaxes(1, 2)
    out, lse = _causal(q, k, v, tokens, block)
    return Partial(join_heads(out), join_heads(lse[..., None])[..., 0])
