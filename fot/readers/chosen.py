"""Attention to chosen slots of a memory: what all readers that choose have in common."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fot import attention
from fot.attention import Partial
from fot.memory import Slots


class Chosen(NamedTuple):
    """Slots chosen per query and head, no slot twice.

    Attributes:
      index: [B, G, R, T, K] int32, slots.
      score: [B, G, R, T, K] float32, logits without gradient; -inf stands for nothing, where fewer than K were found.
    """

    index: jax.Array
    score: jax.Array


def attend(q_BGRTH: jax.Array, slots: Slots, chosen: Chosen) -> Partial:
    """Attention to the chosen slots; what was not chosen gets no gradient."""
    s = _logits(q_BGRTH, slots.keys, *chosen)
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.exp(s - attention.finite(lse)[..., None])
    values = _take(slots.values, chosen.index)
    out = jnp.einsum("bgrtk,bgrtkh->bgrth", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])


@jax.custom_jvp
def _logits(q_BGRTH: jax.Array, keys_BGMH: jax.Array, index: jax.Array, score: jax.Array) -> jax.Array:
    """Returns the scores, as the logits of queries and keys that they are: only a gradient looks at these again."""
    return score


@functools.partial(_logits.defjvp, symbolic_zeros=True)
def _logits_jvp(primals, tangents):
    q, keys, index, score = primals
    seen, change = score > -jnp.inf, jnp.zeros_like(score)

    def product(q, keys):
        return jnp.einsum("bgrth,bgrtkh->bgrtk", q, _take(keys, index), preferred_element_type=jnp.float32)

    if not isinstance(tangents[0], SymbolicZero):
        change += product(tangents[0], keys)
    if not isinstance(tangents[1], SymbolicZero):
        change += product(q, tangents[1])
    return score, jnp.where(seen, change, 0.0)


def _take(x_BGMH: jax.Array, index_BGRTK: jax.Array) -> jax.Array:
    """Returns the rows of those slots, [B, G, R, T, K, H]."""
    return jax.vmap(jax.vmap(lambda x_MH, index_RTK: x_MH[index_RTK]))(x_BGMH, index_BGRTK)


def best(candidates: Chosen, count: int) -> Chosen:
    """Returns the candidates of largest score, the largest first; of equal ones the first."""
    score, choice = jax.lax.top_k(candidates.score, count)
    return Chosen(jnp.take_along_axis(candidates.index, choice, -1), score)


def query_visible(documents: jax.Array, query_documents: jax.Array, multi_doc: bool) -> jax.Array:
    """Which slots of these documents queries of those see; the shapes broadcast."""
    real = documents >= 0
    return real if multi_doc else real & (documents == query_documents)


class Cut(NamedTuple):
    """A block of slots that streams past: its first slot, and its documents [B, S] with -1 where nothing counts."""

    start: jax.Array
    documents: jax.Array


def cut(slots: Slots, first: jax.Array, size: int) -> Cut:
    """Returns the block of `size` slots from `first`; past the end it begins earlier, and those slots don't count."""
    start = jnp.minimum(first, slots.documents.shape[1] - size)
    documents_BS = jax.lax.dynamic_slice_in_dim(slots.documents, start, size, 1)
    return Cut(start, jnp.where(start + jnp.arange(size) >= first, documents_BS, -1))


def scores(q_BGRTH: jax.Array, documents_BT: jax.Array, slots: Slots, block: Cut, multi_doc: bool) -> jax.Array:
    """Returns the logits of a block [B, G, S, R, T], -inf where a slot is not visible.

    Queries come last, so that a maximum over neighbouring slots is one of whole vectors.
    """
    keys = jax.lax.dynamic_slice_in_dim(slots.keys, block.start, block.documents.shape[1], 2)
    s = jnp.einsum("bgsh,bgrth->bgsrt", keys, q_BGRTH, preferred_element_type=jnp.float32)
    seen = query_visible(block.documents[:, :, None], documents_BT[:, None], multi_doc)
    return jnp.where(seen[:, None, :, None], s, -jnp.inf)
