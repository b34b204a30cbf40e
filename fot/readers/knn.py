"""Attention to the nearest slots of a memory, exactly."""

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Partial
from fot.memory import Slots
from fot.readers.reader import Block, Reader, fold, visible


def knn(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product, per query and head, exact (FoT, section 3.1).

    Slots are scored block by block, so that nothing of the size queries × slots exists.
    """
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    count = min(reader.neighbours, slots.documents.shape[1])

    def step(best, block: Block):
        s = attention.logits(q, block.keys, visible(documents_BT, block, reader))
        index = jnp.broadcast_to(block.start + jnp.arange(s.shape[-1]), s.shape)
        # The best so far come first: of equal logits the lower slot wins, whatever the size of a block.
        top, choice = jax.lax.top_k(jnp.concatenate([best[0], s], -1), count)
        return top, jnp.take_along_axis(jnp.concatenate([best[1], index], -1), choice, -1)

    nothing = jnp.full((*q.shape[:-1], count), -jnp.inf), jnp.zeros((*q.shape[:-1], count), jnp.int32)
    top_BGRTK, index_BGRTK = fold(step, nothing, slots, reader.block)
    lse = jax.nn.logsumexp(top_BGRTK, -1)
    p = jnp.exp(top_BGRTK - attention.finite(lse)[..., None])
    chosen = jax.vmap(jax.vmap(lambda v_MH, i_RTK: v_MH[i_RTK]))(slots.values, index_BGRTK)
    out = jnp.einsum("bgrtk,bgrtkh->bgrth", p.astype(chosen.dtype), chosen, preferred_element_type=jnp.float32)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])
