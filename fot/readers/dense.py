"""Attention to a whole memory."""

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Partial
from fot.memory import Slots
from fot.readers.reader import Block, Reader, fold, visible


def dense(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to every visible slot, streamed in blocks (LongLLaMA)."""
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])

    def step(running, block: Block):
        s = attention.logits(q, block.keys, visible(documents_BT, block, reader))
        return attention.accumulate(running, s, block.values)

    whole = Block(slots.keys, slots.values, slots.documents, jnp.int32(0))
    if attention.few(q, slots.keys):
        running = attention.attend_few(q, slots.keys, slots.values, visible(documents_BT, whole, reader))
    else:
        running = fold(step, attention.start(q), slots, reader.block)
    out, lse = attention.finish(running)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])
