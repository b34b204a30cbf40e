"""Attention to chosen slots of a memory: what all readers that choose have in common."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    keys = _take(slots.keys, chosen.index)
    s = jnp.einsum("bgrth,bgrtkh->bgrtk", q_BGRTH, keys, preferred_element_type=jnp.float32)
    s = jnp.where(chosen.score > -jnp.inf, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.exp(s - attention.finite(lse)[..., None])
    values = _take(slots.values, chosen.index)
    out = jnp.einsum("bgrtk,bgrtkh->bgrth", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])


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
