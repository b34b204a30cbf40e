"""Attention to the nearest slots of a memory, exactly.

Two steps. First all slots are scored block by block, and of the scores only the largest of each group of neighbouring
slots is kept. The k slots sought lie in the k groups of the largest maxima: a slot outside them has k slots before it,
one in each. Then those k groups are scored again, and the best k slots of them taken. The first step is a matrix
product and a maximum that stay in the cache, and top_k, slow on all hardware, sees one number per group.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Partial
from fot.memory import Slots
from fot.readers import chosen
from fot.readers.chosen import Chosen
from fot.readers.reader import Reader

_GROUP = 32  # slots of the largest groups
_MAXIMA = 2**25  # numbers held between two calls of top_k, 128 MiB
_CANDIDATES = 2**21  # numbers of the keys that are scored again at once, 8 MiB


def knn(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product, per query and head, exact (FoT, section 3.1).

    Nothing of the size queries × slots exists. Of equal logits the lower slot wins.
    """
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    return chosen.attend(q, slots, nearest(q, documents_BT, slots, reader))


def nearest(q_BGRTH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Chosen:
    """Returns the k visible slots of largest inner product, the largest first; without gradient."""
    q, slots = jax.lax.stop_gradient((q_BGRTH, slots))
    M = slots.documents.shape[1]
    count = min(reader.neighbours, M)
    if count == 0:
        shape = (*q.shape[:-1], 0)
        return Chosen(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    grid = _grid(M, count, reader.block)
    best = _groups(q, documents_BT, slots, reader, grid, count)
    if grid.group == 1:
        return Chosen(grid.start(best.group), best.maximum)
    return _refine(q, documents_BT, slots, reader, grid, best.group)


class _Grid(NamedTuple):
    """How slots are cut: groups of `group`, blocks of `size`; the last block ends with the last slot.

    What the last block shares with the one before it counts in that one alone.
    """

    slots: int
    group: int
    size: int

    @property
    def blocks(self) -> int:
        return -(-self.slots // self.size)

    def start(self, group: jax.Array) -> jax.Array:
        """The first slot of a group."""
        block, place = group // (self.size // self.group), group % (self.size // self.group)
        return jnp.minimum(block * self.size, self.slots - self.size) + place * self.group

    def counts(self, group: jax.Array, slot: jax.Array) -> jax.Array:
        """Whether a slot counts in that group."""
        return slot >= group // (self.size // self.group) * self.size


def _grid(slots: int, count: int, block: int) -> _Grid:
    """Groups as large as makes about as many of them as are slots in the groups that are scored again."""
    group = min(_GROUP, 2 ** int(math.log2(math.sqrt(slots / count))))
    return _Grid(slots, group, min(-(-block // group), slots // group) * group)


class _Best(NamedTuple):
    """Groups of largest maxima [B, G, R, T, K], the largest first, of equal ones the lower group."""

    maximum: jax.Array
    group: jax.Array


def _groups(q, documents_BT, slots: Slots, reader: Reader, grid: _Grid, count: int) -> _Best:
    B, G, R, T, _ = q.shape
    size, in_block = grid.size, grid.size // grid.group
    nothing = jnp.full((B, G, in_block, R, T), -jnp.inf)

    def maxima(number):
        block = chosen.cut(slots, number * size, size)

        def score():
            s = chosen.scores(q, documents_BT, slots, block, reader.multi_doc)
            return s.reshape(B, G, in_block, grid.group, R, T).max(3)

        return jax.lax.cond((block.documents >= 0).any(), score, lambda: nothing)

    chunk = max(1, min(grid.blocks, _MAXIMA // (q.size // q.shape[-1] * in_block)))

    def visit(best: _Best, first):
        new = jax.lax.map(maxima, first + jnp.arange(chunk))
        new = new.transpose(1, 2, 4, 5, 0, 3).reshape(B, G, R, T, -1)
        top, choice = jax.lax.top_k(jnp.concatenate([best.maximum, new], -1), count)
        old = jnp.take_along_axis(best.group, jnp.minimum(choice, count - 1), -1)
        return _Best(top, jnp.where(choice < count, old, first * in_block + choice - count)), None

    shape = (B, G, R, T, count)
    # A group past the last: no slot counts in it.
    empty = _Best(jnp.full(shape, -jnp.inf), jnp.full(shape, grid.blocks * in_block))
    return jax.lax.scan(visit, empty, jnp.arange(0, grid.blocks, chunk))[0]


def _refine(q, documents_BT, slots: Slots, reader: Reader, grid: _Grid, groups_BGRTK: jax.Array) -> Chosen:
    B, G, R, T, H = q.shape
    count = groups_BGRTK.shape[-1]
    # In their order in memory, so that of equal logits the lower slot wins here too.
    groups_BGRTK = jnp.sort(groups_BGRTK, -1)

    def query(each):
        q_BGRH, documents_B, groups_BGRK = each
        start = grid.start(groups_BGRK)
        slot_BGRC = (start[..., None] + jnp.arange(grid.group)).reshape(B, G, R, -1)
        keys_BGRCH = jax.vmap(jax.vmap(lambda k, s: _cut(k, s, grid.group)))(slots.keys, start).reshape(B, G, R, -1, H)
        s = jnp.einsum("bgrh,bgrch->bgrc", q_BGRH, keys_BGRCH, preferred_element_type=jnp.float32)
        documents = jax.vmap(lambda d, s: d[s])(slots.documents, slot_BGRC)
        seen = chosen.query_visible(documents, documents_B[:, None, None, None], reader.multi_doc)
        seen &= grid.counts(jnp.repeat(groups_BGRK, grid.group, -1), slot_BGRC)
        return chosen.best(Chosen(slot_BGRC, jnp.where(seen, s, -jnp.inf)), count)

    each = jnp.moveaxis(q, 3, 0), documents_BT.T, jnp.moveaxis(groups_BGRTK, 3, 0)
    at_once = max(1, min(T, _CANDIDATES // (B * G * R * count * grid.group * H)))
    found = jax.lax.map(query, each, batch_size=at_once)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3), found)


def _cut(keys_MH: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns the keys of the groups that begin there, one after the other, [..., size, H]."""
    H = keys_MH.shape[-1]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(start.ndim, start.ndim + 1), collapsed_slice_dims=(), start_index_map=(0,)
    )
    return jax.lax.gather(keys_MH, start[..., None], numbers, (size, H), mode="clip")
