"""Attention to the nearest slots of the lists whose centroids are nearest (an inverted file, `fot.readers.index`).

Queries are taken to the lists, not lists to the queries: (query, list) pairs are sorted by list, so that the keys of a
list are read once for many queries and meet them in a matrix product.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fot import attention
from fot.attention import Partial
from fot.memory import Lists, Slots
from fot.readers import chosen, knn
from fot.readers.chosen import Chosen
from fot.readers.reader import Reader
from fot.sharding import MESH_AXES, ROWS, over_devices

_TILE = 16  # queries that meet a list at once
_FEW = 8  # a row's slots in no list are few if they are at the most one in so many
_DEVIATIONS = 2.5  # the largest of some hundred normal numbers lies so far above their mean


def clustered(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product among those that were looked at.

    These are the slots of the `reader.probes` lists that promise the largest inner product with the query, and all
    slots whose entries are in no list: without an index that is the whole memory, read exactly.
    """
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    return chosen.attend(q, slots, nearest(q, documents_BT, slots, reader))


def nearest(q_BGRTH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Chosen:
    """Returns the k visible slots of largest inner product that were looked at; without gradient."""
    if slots.lists is None or slots.documents.shape[1] == 0:
        return knn.nearest(q_BGRTH, documents_BT, slots, reader)
    q, slots = jax.lax.stop_gradient((q_BGRTH, slots))
    B, G, R, T, H = q.shape
    count = min(reader.neighbours, slots.documents.shape[1])
    listed_BM = jnp.where(slots.listed, slots.documents, -1)
    query_documents = jnp.broadcast_to(documents_BT[:, None], (B, R, T)).reshape(B, R * T)

    rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, MESH_AXES["kv_heads"])
    search = functools.partial(_search_heads, count=count, reader=reader)
    search = over_devices(search, in_specs=(heads, rows, rows, heads), out_specs=heads)
    found = search(q.reshape(B, G, R * T, H), query_documents, listed_BM, slots.lists)
    found = jax.tree.map(lambda x: x.reshape(B, G, R, T, -1), found)
    unlisted = (~slots.listed).sum(1).max()
    few = slots.documents.shape[1] // _FEW

    def join(rest: Callable[[], Chosen]) -> Chosen:
        return chosen.best(jax.tree.map(lambda *x: jnp.concatenate(x, -1), found, rest()), count)

    return jax.lax.switch(
        (unlisted > 0).astype(int) + (unlisted > few),
        [
            lambda: found,
            lambda: join(lambda: _nearest_of_few(q, documents_BT, slots, reader, few)),
            lambda: join(lambda: knn.nearest(q, documents_BT, _without_listed(slots), reader)),
        ],
    )


def _without_listed(slots: Slots) -> Slots:
    return slots._replace(documents=jnp.where(slots.listed, -1, slots.documents))


def _nearest_of_few(q_BGRTH, documents_BT, slots: Slots, reader: Reader, few: int) -> Chosen:
    """Returns the nearest of the slots that are in no list, `few` of a row at the most, which lie together."""
    M = slots.documents.shape[1]
    first_B = (~slots.listed & jnp.roll(slots.listed, 1, axis=1)).argmax(1)  # after the newest slot comes the oldest
    slot_BS = (first_B[:, None] + jnp.arange(few)) % M
    documents = jnp.take_along_axis(_without_listed(slots).documents, slot_BS, 1)
    keys = jnp.take_along_axis(slots.keys, slot_BS[:, None, :, None], 2)
    found = knn.nearest(q_BGRTH, documents_BT, Slots(keys, keys, documents), reader)
    index = jax.vmap(lambda slot_S, choice: slot_S[choice])(slot_BS, found.index)
    return found._replace(index=index)


def _search_heads(q_BGQH, query_documents_BQ, documents_BM, lists: Lists, *, count: int, reader: Reader) -> Chosen:
    """Searches the lists of head after head; a list's keys are cut out of all, as a head's alone would be a copy."""
    B, G = q_BGQH.shape[:2]
    small = lists._replace(keys=None)

    def head(number):
        row, head = number // G, number % G

        def keys_at(start: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice(lists.keys, (row, head, start, 0), (1, 1, size, lists.keys.shape[-1]))[0, 0]

        each = jax.tree.map(lambda x: x[row, head], (q_BGQH, small))
        return _search(query_documents_BQ[row], documents_BM[row], *each, keys_at, count=count, reader=reader)

    found = jax.lax.map(head, jnp.arange(B * G))
    return jax.tree.map(lambda x: x.reshape(B, G, *x.shape[1:]), found)


def _search(
    query_documents_Q, documents_M, q_QH, lists: Lists, keys_at: Callable, *, count: int, reader: Reader
) -> Chosen:
    """Searches the lists of one head; `keys_at(start, size)` are their keys [size, H] from a place of their order."""
    Q, M, count_I = len(q_QH), len(lists.order), len(lists.length)
    probes, size = min(reader.probes, count_I), min(reader.list_size, M)
    list_QP = jax.lax.top_k(_promise(q_QH, lists), probes)[1]
    list_X, order_X = jax.lax.sort_key_val(list_QP.reshape(-1), jnp.arange(Q * probes))  # X pairs of query and list
    tile = min(_TILE, Q)
    tiles = _tiles(list_X, count_I, tile)
    query_X = jnp.pad(order_X, (0, tile)) // probes
    q_XH, query_documents_X, documents_L = q_QH[query_X], query_documents_Q[query_X], documents_M[lists.order]
    start_I = jnp.minimum(lists.begin, M - size)
    cut = jax.lax.dynamic_slice_in_dim

    def visit(number, scores_XS):
        which, first = tiles.list[number], tiles.first[number]
        start = start_I[which]
        keys_SH = keys_at(start, size)
        s = jnp.einsum("qh,sh->qs", cut(q_XH, first, tile), keys_SH, preferred_element_type=jnp.float32)
        place_S = start - lists.begin[which] + jnp.arange(size)
        documents_S = jnp.where((place_S >= 0) & (place_S < lists.length[which]), cut(documents_L, start, size), -1)
        seen = chosen.query_visible(documents_S, cut(query_documents_X, first, tile)[:, None], reader.multi_doc)
        # A tile's rows past its list's pairs are overwritten by the tiles that follow.
        return jax.lax.dynamic_update_slice_in_dim(scores_XS, jnp.where(seen, s, -jnp.inf), first, 0)

    scores_XS = jax.lax.fori_loop(0, tiles.count, visit, jnp.full((Q * probes + tile, size), -jnp.inf))
    place_QP = jnp.zeros_like(order_X).at[order_X].set(jnp.arange(Q * probes)).reshape(Q, probes)
    found = min(count, probes * size)
    score, choice = _top(scores_XS, place_QP, found)
    index = lists.order[start_I[jnp.take_along_axis(list_QP, choice // size, 1)] + choice % size]
    rest = ((0, 0), (0, count - found))
    return Chosen(jnp.pad(index, rest), jnp.pad(score, rest, constant_values=-jnp.inf))


def _promise(q_QH: jax.Array, lists: Lists) -> jax.Array:
    """Returns the largest inner product that a query may hope for in each list [Q, I], -inf where there is none.

    It is that of the mean, and `_DEVIATIONS` standard deviations of the keys' inner products with a query of this
    length: a tight list that lies near is passed over for a wide one that lies a little farther.
    """
    q_QH = q_QH.astype(jnp.float32)
    deviation_Q = jnp.linalg.norm(q_QH, axis=-1) / math.sqrt(q_QH.shape[-1])
    s_QI = jnp.einsum("qh,ih->qi", q_QH, lists.mean, preferred_element_type=jnp.float32)
    s_QI += _DEVIATIONS * deviation_Q[:, None] * lists.spread
    return jnp.where(lists.length > 0, s_QI, -jnp.inf)


class _Tiles(NamedTuple):
    """Runs of pairs of one list: its number [Y], the first pair [Y], and how many tiles there are (a scalar)."""

    list: jax.Array
    first: jax.Array
    count: jax.Array


def _tiles(list_X: jax.Array, lists: int, tile: int) -> _Tiles:
    """Cuts pairs, sorted by list, into tiles of at most `tile` pairs of one list."""
    begin_I = jnp.searchsorted(list_X, jnp.arange(lists + 1)).astype(jnp.int32)
    end_I = jnp.cumsum(-(-jnp.diff(begin_I) // tile))  # where a list's tiles end
    number_Y = jnp.arange(lists + len(list_X) // tile)
    list_Y = jnp.minimum(jnp.searchsorted(end_I, number_Y, side="right"), lists - 1)
    before_Y = jnp.where(list_Y > 0, end_I[list_Y - 1], 0)
    return _Tiles(list_Y, begin_I[list_Y] + (number_Y - before_Y) * tile, end_I[-1])


def _top(scores_XS: jax.Array, place_QP: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the largest scores of each query's rows and where they are among P·S; by way of groups, as in `knn`."""
    (Q, P), S = place_QP.shape, scores_XS.shape[1]
    group = math.gcd(S, 2 ** int(math.log2(math.sqrt(P * S / count))))
    parts_XG = scores_XS.reshape(-1, S // group, group)
    best_QK = jax.lax.top_k(parts_XG.max(-1)[place_QP].reshape(Q, -1), count)[1]
    pair_QK, part_QK = best_QK // (S // group), best_QK % (S // group)
    near = parts_XG[jnp.take_along_axis(place_QP, pair_QK, 1), part_QK].reshape(Q, -1)
    score, choice = jax.lax.top_k(near, count)
    return score, jnp.take_along_axis(best_QK, choice // group, 1) * group + choice % group
