"""Memory of (key, value) pairs: fixed capacity, written window by window, read by attention (`fot.readers`).

FoT, section 3.1. A memory holds no positions: keys are stored as at position 0 or without any position at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from fot import device
from fot.errors import UserError


class Lists(NamedTuple):
    """Slots in lists by the direction of their keys, an inverted file: one layer's, or with a first axis L.

    Attributes:
      centroids: [B, G, C, H], unit vectors.
      axes: [B, G, C, H], unit vectors, the direction in which the keys of a cluster differ most.
      cluster: [B, G, M] int32, the centroid that each slot belongs to; C is none.
      order: [B, G, M] int32, the slots, cluster by cluster and along its axis; those of none at the end.
      keys: [B, G, M, H], a copy of their keys in this order, so that a list is read as one piece.
      mean: [B, G, I, H], the mean of the keys of each list, and
      spread: [B, G, I] float32, their root mean square distance from it. A large cluster has several lists.
      begin: [B, G, I] int32, where in `order` each list begins.
      length: [B, G, I] int32, slots of each list; 0 where there is no list.
    """

    centroids: jax.Array
    axes: jax.Array
    cluster: jax.Array
    order: jax.Array
    keys: jax.Array
    mean: jax.Array
    spread: jax.Array
    begin: jax.Array
    length: jax.Array


class Stack(NamedTuple):
    """Where a layer lies among all: keys and values [L, B, G, M, H], and which of them it is."""

    keys: jax.Array
    values: jax.Array
    layer: int | jax.Array


class Slots(NamedTuple):
    """One layer's view of a memory.

    Attributes:
      keys, values: [B, G, M, H].
      documents: [B, M] int32, document of the entry's token; -1 is an empty slot.
      lists: the slots in lists, for readers that use them; None if nothing made them.
      listed: [B, M] bool, the slots whose entries `lists` knows; None without lists.
      stack: what the view is of, for kernels, for which a layer would be copied out of it; None if it is of nothing, or
        where keys or values were changed.
    """

    keys: jax.Array
    values: jax.Array
    documents: jax.Array
    lists: Lists | None = None
    listed: jax.Array | None = None
    stack: Stack | None = None


class Index(NamedTuple):
    """What `fot.readers.index` keeps of a memory.

    Attributes:
      lists: with a first axis L.
      covered: [B] int32, the first so many entries of a row are in the lists.
    """

    lists: Lists
    covered: jax.Array


class Memory(NamedTuple):
    """Entries of all memory layers, for B rows of at most M slots each; when full, the oldest entry gives way.

    Attributes:
      keys, values: [L, B, G, M, H], L counting memory layers only; a head's slots lie together, as they are read.
      documents: [B, M] int32, document of the entry's token; -1 is an empty slot.
      written: [B] int32, how many entries the row has taken since it was cleared.
      index: lists of slots, which `fot.readers.index` makes; None without.
    """

    keys: jax.Array
    values: jax.Array
    documents: jax.Array
    written: jax.Array
    index: Index | None = None

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
        stack = Stack(self.keys, self.values, layer)
        slots = Slots(self.keys[layer], self.values[layer], self.documents, stack=stack)
        if self.index is None:
            return slots
        lists = jax.tree.map(lambda x: x[layer], self.index.lists)
        return slots._replace(lists=lists, listed=self.entries < self.index.covered[:, None])

    @property
    def entries(self) -> jax.Array:
        """[B, M] int32, which entry of its row, counted from the first written, each slot holds; below 0 is none."""
        newest = self.written[:, None] - 1
        return newest - (newest - jnp.arange(self.capacity)) % max(self.capacity, 1)


def empty(layers: int, rows: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Memory:
    """Returns a memory without entries for `layers` memory layers."""
    shape = (layers, rows, kv_heads, capacity, head_dim)
    return Memory(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        documents=jnp.full((rows, capacity), -1, jnp.int32),
        written=jnp.zeros(rows, jnp.int32),
    )


def clear(memory: Memory, rows_B: jax.Array) -> Memory:
    """Empties the rows where `rows_B` [B] bool is true."""
    index = memory.index
    return memory._replace(
        documents=jnp.where(rows_B[:, None], -1, memory.documents),
        written=jnp.where(rows_B, 0, memory.written),
        index=index and index._replace(covered=jnp.where(rows_B, 0, index.covered)),
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
    return write_part(memory, keys, values, documents_BT, 0, memory.capacity)


def write_part(
    part: Memory,
    keys: jax.Array,
    values: jax.Array,
    documents_BT: jax.Array,
    first: jax.Array | int,
    capacity: int,
) -> Memory:
    """Appends a window's entries, as `write` does, to a memory of which a device holds a part of the slots.

    Args:
      part: the slots `first`, `first` + 1, ... of each row; what belongs elsewhere is left out.
      keys, values, documents_BT: see `write`.
      first: number of the part's first slot.
      capacity: slots of a row in all parts together.

    Returns:
      The new part.
    """
    keys, values, documents_BT = map(jnp.asarray, (keys, values, documents_BT))
    count_B = (documents_BT >= 0).sum(1)
    written = part._replace(written=part.written + count_B)
    if not part.capacity:
        return written
    order_BT = jnp.argsort(documents_BT < 0, axis=1, stable=True)  # the tokens that are written come first
    width = min(documents_BT.shape[1], part.capacity)
    start_B = jnp.clip(part.written % capacity - first, 0, part.capacity - width)

    def put(row: jax.Array, held: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # A window is one piece of a row, or the end of a row and its begin.
        for place in (start_B[row], 0):
            offset_W = (first + place + jnp.arange(width) - part.written[row]) % capacity
            entry_W = offset_W + (count_B[row] - 1 - offset_W) // capacity * capacity  # the newest; below 0 is none
            token_W = order_BT[row, jnp.maximum(entry_W, 0)]
            new = [x[:, row, token_W][:, None].swapaxes(2, 3) for x in (keys, values)]
            mask, at = (entry_W >= 0)[:, None], (0, row, 0, place, 0)
            held = (
                _put(held[0], new[0], mask, at),
                _put(held[1], new[1], mask, at),
                _put(held[2], documents_BT[row, token_W][None], entry_W >= 0, (row, place)),
            )
        return held

    dtype = part.keys.dtype
    keys, values, *held = (for_writing(x.astype(dtype)) for x in (keys, values, part.keys, part.values))
    *pairs, documents = jax.lax.fori_loop(0, len(documents_BT), put, (*held, part.documents))
    keys, values = (after_writing(x, dtype) for x in pairs)
    return written._replace(keys=keys, values=values, documents=documents)


def _put(held: jax.Array, new: jax.Array, mask: jax.Array, at: tuple[jax.Array | int, ...]) -> jax.Array:
    """Returns `held` with the new values at that place where the mask is true, in the memory that it has.

    In row-major order, or the TPU's compiler would lay out all that is held anew, as suits the new values.
    """
    new = jnp.where(mask, new, jax.lax.dynamic_slice(held, at, new.shape))
    return _row_major(jax.lax.dynamic_update_slice(_row_major(held), _row_major(new), at))


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, row_major(x.ndim))


def row_major(dimensions: int) -> Layout:
    """Returns the layout of memories: a slot's numbers side by side."""
    return Layout(tuple(range(dimensions)))


def for_writing(x: jax.Array) -> jax.Array:
    """Returns bfloat16 as integers on a CPU, where XLA would convert all that is held to float32 and back to write."""
    if x.dtype != jnp.bfloat16 or device.platform() != "cpu":
        return x
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def after_writing(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns what `for_writing` made of an array of that dtype as it was."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _refuse(written_B: np.ndarray, count_B: np.ndarray, capacity: int) -> None:
    full_B = written_B + count_B > capacity
    if full_B.any():
        row = int(full_B.argmax())
        raise UserError(
            f"row {row} would have {int(written_B[row] + count_B[row]):,} memory entries but has room for "
            f"{capacity:,}: raise evaluate.memory, or set evaluate.overflow=drop_oldest"
        )


# What to do about entries for which a row has no room, before they are written, on the host:
# (entries written [B], entries to write [B], capacity) -> None, or raises UserError.
OVERFLOWS: dict[str, Callable[[np.ndarray, np.ndarray, int], None]] = {
    "drop_oldest": lambda written_B, count_B, capacity: None,
    "refuse": _refuse,
}
