"""The local context of generation: keys and values of every layer, token after token (FoT, section 3.1).

As in the released LongLLaMA code, places count from a row's oldest entry, and a row that would outgrow the local
context gives up all its entries at once. Rows have lengths of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fot.attention import Partial
from fot.config import ModelConfig
from fot.memory import Slots, after_writing, for_writing
from fot.readers.dense import dense
from fot.readers.reader import Reader


class Entries(NamedTuple):
    """Keys and values of new tokens, for each layer an array; what isn't for the cache alone isn't rotated.

    Attributes:
      keys: [B, T, G, H] of each layer, rotated to their places where the layer has positions.
      values: [B, T, G, H] of each layer.
      stored: [B, T, G, H] of each memory layer, the keys as others see them.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    stored: tuple[jax.Array, ...]


class Cache(NamedTuple):
    """Entries of all layers, for B rows of at most S each.

    An array for each layer, so that a layer is read where it lies; cut out of a common one it would be copied.

    Attributes:
      keys: [B, G, S, H] of each layer, rotated to their places where the layer has positions.
      values: [B, G, S, H] of each layer.
      stored: [B, G, S, H] of each memory layer, the keys as a memory takes them.
      length: [B] int32, entries of each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    stored: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Entries that a row has room for, S."""
        return self.keys[0].shape[2]


def layer_of(cache: Cache, index: int, config: ModelConfig) -> Cache:
    """Returns the cache of one layer alone."""
    stored = tuple(x for x, layer in zip(cache.stored, config.memory_layers, strict=True) if layer == index)
    return Cache((cache.keys[index],), (cache.values[index],), stored, cache.length)


def joined(layers: Sequence[Cache]) -> Cache:
    """Returns the cache of all layers, of those of each."""
    *arrays, lengths = zip(*layers, strict=True)
    return Cache(*(sum(each, ()) for each in arrays), lengths[-1])


def append(cache: Cache, new: Entries, count_B: jax.Array) -> Cache:
    """Appends the first `count_B` of the new tokens of each row, for which there must be room."""
    place_T = jnp.arange(new.keys[0].shape[1])
    slot_BT = jnp.where(place_T < count_B[:, None], cache.length[:, None] + place_T, cache.capacity)
    index = (
        jnp.arange(len(slot_BT))[:, None, None],
        jnp.arange(new.keys[0].shape[2])[:, None],
        slot_BT[:, None],
    )

    def put(held: jax.Array, new: jax.Array) -> jax.Array:
        written = for_writing(held).at[index].set(for_writing(new).swapaxes(1, 2), mode="drop")
        return after_writing(written, held.dtype)

    keys, values, stored = (
        tuple(map(put, *pair))
        for pair in ((cache.keys, new.keys), (cache.values, new.values), (cache.stored, new.stored))
    )
    return Cache(keys, values, stored, cache.length + count_B)


def fill(new: Entries, count_B: jax.Array, capacity: int) -> Cache:
    """Returns a cache with the first `count_B` of those tokens of each row, and room for `capacity`."""

    def zeros(new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((x.shape[0], x.shape[2], capacity, x.shape[3]), x.dtype) for x in new)

    return append(Cache(*map(zeros, new), jnp.zeros_like(count_B)), new, count_B)


def forget(cache: Cache, rows_B: jax.Array) -> Cache:
    """Empties the rows where `rows_B` [B] bool is true."""
    return cache._replace(length=jnp.where(rows_B, 0, cache.length))


def attend(
    q_BTNH: jax.Array, keys_BGSH: jax.Array, values_BGSH: jax.Array, length_B: jax.Array, reader: Reader
) -> Partial:
    """Attention to all entries of a layer's cache.

    Args:
      q_BTNH: queries, scaled, and rotated to their places if the keys are.
      keys_BGSH: keys of the cache.
      values_BGSH: values of the cache.
      length_B: entries of each row.
      reader: its `block` and `attention_kernel` count.

    Returns:
      Partial attention over what came before the queries.
    """
    document_BS = jnp.where(jnp.arange(keys_BGSH.shape[2]) < length_B[:, None], 0, -1)
    document_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    return dense(q_BTNH, document_BT, Slots(keys_BGSH, values_BGSH, document_BS), reader)
