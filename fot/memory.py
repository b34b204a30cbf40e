"""Memory of (key, value) pairs: fixed capacity, written window by window, read by attention.

FoT, section 3.1. A memory holds no positions: keys are stored as at position 0 or without any position at all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Partial, Tokens


class Slots(NamedTuple):
    """One layer's view of a memory.

    Attributes:
      keys, values: [B, M, G, H].
      documents: [B, M] int32, document of the entry's token; -1 is an empty slot.
    """

    keys: jax.Array
    values: jax.Array
    documents: jax.Array


class Memory(NamedTuple):
    """Entries of all memory layers, for B rows of at most M slots each; when full, the oldest entry gives way.

    Attributes:
      keys, values: [L, B, M, G, H], L counting memory layers only.
      documents: [B, M] int32, document of the entry's token; -1 is an empty slot.
      written: [B] int32, how many entries the row has taken since it was cleared.
    """

    keys: jax.Array
    values: jax.Array
    documents: jax.Array
    written: jax.Array

    @property
    def capacity(self) -> int:
        """Slots of a row, M."""
        return self.documents.shape[1]

    @property
    def length(self) -> jax.Array:
        """[B] int32, filled slots of each row."""
        return jnp.minimum(self.written, self.capacity)

    def slots(self, layer: int) -> Slots:
        """Returns the view of the layer-th memory layer."""
        return Slots(self.keys[layer], self.values[layer], self.documents)


def empty(layers: int, rows: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Memory:
    """Returns a memory without entries for `layers` memory layers."""
    shape = (layers, rows, capacity, kv_heads, head_dim)
    return Memory(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        documents=jnp.full((rows, capacity), -1, jnp.int32),
        written=jnp.zeros(rows, jnp.int32),
    )


def clear(memory: Memory, rows_B: jax.Array) -> Memory:
    """Empties the rows where `rows_B` [B] bool is true."""
    return memory._replace(
        documents=jnp.where(rows_B[:, None], -1, memory.documents),
        written=jnp.where(rows_B, 0, memory.written),
    )


def write(memory: Memory, keys: jax.Array, values: jax.Array, documents_BT: jax.Array) -> Memory:
    """Appends a window's entries; a full row drops its oldest ones.

    Args:
      memory: the memory to append to.
      keys: [L, B, T, G, H], as others see them.
      values: [L, B, T, G, H].
      documents_BT: int32, documents of the tokens; tokens of document -1 (padding) are not written.

    Returns:
      The new memory.
    """
    capacity = memory.capacity
    real_BT = documents_BT >= 0
    rank_BT = jnp.cumsum(real_BT, axis=1) - 1
    count_B = real_BT.sum(1)
    kept_BT = real_BT & (rank_BT >= (count_B - capacity)[:, None])
    slot_BT = jnp.where(kept_BT, (memory.written[:, None] + rank_BT) % max(capacity, 1), capacity)
    row_B1 = jnp.arange(documents_BT.shape[0])[:, None]
    return Memory(
        keys=memory.keys.at[:, row_B1, slot_BT].set(keys.astype(memory.keys.dtype), mode="drop"),
        values=memory.values.at[:, row_B1, slot_BT].set(values.astype(memory.values.dtype), mode="drop"),
        documents=memory.documents.at[row_B1, slot_BT].set(documents_BT, mode="drop"),
        written=memory.written + count_B,
    )


class Reader(NamedTuple):
    """How a memory is read: plain numbers and a name, fixed for a run.

    Attributes:
      name: an entry of `READERS`.
      neighbours: entries retrieved per query and head, k; for top-k readers.
      block: slots scored at once; bounds memory, changes no result.
      multi_doc: whether a query sees entries of other documents than its own.
    """

    name: str
    neighbours: int
    block: int
    multi_doc: bool


def dense(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to every visible slot, streamed in blocks (LongLLaMA)."""
    q = attention.split_heads(q_BTNH, slots.keys.shape[2])

    def step(running, block: _Block):
        s = attention.logits(q, block.keys, _visible(documents_BT, block, reader))
        return attention.accumulate(running, s, block.values)

    out, lse = attention.finish(_fold(step, attention.start(q), slots, reader.block))
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])


def knn(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product, per query and head, exact (FoT, section 3.1).

    Slots are scored block by block, so that nothing of the size queries × slots exists.
    """
    q = attention.split_heads(q_BTNH, slots.keys.shape[2])
    count = min(reader.neighbours, slots.documents.shape[1])

    def step(best, block: _Block):
        s = attention.logits(q, block.keys, _visible(documents_BT, block, reader))
        index = jnp.broadcast_to(block.start + jnp.arange(s.shape[-1]), s.shape)
        # The best so far come first: of equal logits the lower slot wins, whatever the size of a block.
        top, choice = jax.lax.top_k(jnp.concatenate([best[0], s], -1), count)
        return top, jnp.take_along_axis(jnp.concatenate([best[1], index], -1), choice, -1)

    nothing = jnp.full((*q.shape[:-1], count), -jnp.inf), jnp.zeros((*q.shape[:-1], count), jnp.int32)
    top_BGRTK, index_BGRTK = _fold(step, nothing, slots, reader.block)
    lse = jax.nn.logsumexp(top_BGRTK, -1)
    p = jnp.exp(top_BGRTK - attention.finite(lse)[..., None])
    heads_G111 = jnp.arange(q.shape[1])[:, None, None, None]
    chosen = jax.vmap(lambda v_MGH, i_GRTK: v_MGH[i_GRTK, heads_G111])(slots.values, index_BGRTK)
    out = jnp.einsum("bgrtk,bgrtkh->bgrth", p.astype(chosen.dtype), chosen, preferred_element_type=jnp.float32)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])


READERS: dict[str, Callable[[jax.Array, jax.Array, Slots, Reader], Partial]] = {"dense": dense, "knn": knn}


def read(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attends to a memory with the reader of that name.

    Args:
      q_BTNH: queries, already scaled.
      documents_BT: int32, documents of the queries' tokens.
      slots: one layer's view of the memory.
      reader: how to read.

    Returns:
      Partial attention over what is visible; lse is -inf where nothing is.
    """
    return READERS[reader.name](q_BTNH, documents_BT, slots, reader)


class _Block(NamedTuple):
    """A block of slots, head-major: keys and values [B, G, S, H], documents [B, S]; `start` is its first slot."""

    keys: jax.Array
    values: jax.Array
    documents: jax.Array
    start: jax.Array


def _fold(step: Callable[[Any, _Block], Any], carry: Any, slots: Slots, block: int) -> Any:
    """Folds `step` over the blocks of the slots that are not empty in all rows; so an unfilled memory costs little.

    Blocks are cut out one by one, so the memory is never copied. The last one ends with the last slot; what it
    shares with the one before is empty in it.
    """
    M = slots.documents.shape[1]
    if M == 0:
        return carry
    size = min(block, M)

    def visit(carry, first):
        start = jnp.minimum(first, M - size)

        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        documents = jnp.where(start + jnp.arange(size) >= first, cut(slots.documents), -1)

        def take(carry):
            return step(
                carry, _Block(cut(slots.keys).swapaxes(1, 2), cut(slots.values).swapaxes(1, 2), documents, start)
            )

        return jax.lax.cond((documents >= 0).any(), take, lambda carry: carry, carry), None

    return jax.lax.scan(visit, carry, jnp.arange(0, M, size))[0]


def _visible(documents_BT: jax.Array, block: _Block, reader: Reader) -> jax.Array:
    """Which slots each query may see: what a memory holds was read before any of its queries."""
    queries = Tokens(documents_BT, jnp.zeros_like(documents_BT))
    keys = Tokens(block.documents, jnp.zeros_like(block.documents))
    return attention.visible(queries, keys, jnp.full(documents_BT.shape[0], reader.multi_doc))
