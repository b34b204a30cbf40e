"""Attention to the nearest slots of the lists whose centroids are nearest (an inverted file, `fot.readers.index`).

Queries are taken to the lists, not lists to the queries: (query, list) pairs are sorted by list, so that the keys of a
list are read once for many queries and meet them in a matrix product.
"""

import functools

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Partial
from fot.memory import Lists, Slots
from fot.readers import chosen, knn
from fot.readers.chosen import Chosen
from fot.readers.reader import Reader

_TILE = 16  # queries that meet a list at once


def clustered(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product among those that were looked at.

    These are the slots of the `reader.probes` lists whose centroids have the largest inner product with the query, and
    all slots whose entries are in no list: without an index that is the whole memory, read exactly.
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
    search = jax.vmap(
        jax.vmap(functools.partial(_search, multi_doc=reader.multi_doc, count=count, probes=reader.probes), (0, None, 0, None, 0)),
    )
    queries = jnp.broadcast_to(documents_BT[:, None], (B, R, T)).reshape(B, R * T)
    found = search(q.reshape(B, G, R * T, H), queries, slots.keys, listed_BM, slots.lists)
    found = jax.tree.map(lambda x: x.reshape(B, G, R, T, -1), found)
    unlisted = slots._replace(documents=jnp.where(slots.listed, -1, slots.documents))

    def join(found):
        rest = knn.nearest(q, documents_BT, unlisted, reader)
        return chosen.best(jax.tree.map(lambda *x: jnp.concatenate(x, -1), found, rest), count)

    return jax.lax.cond((unlisted.documents >= 0).any(), join, lambda found: found, found)


def _search(q_QH, documents_Q, keys_MH, documents_M, lists: Lists, *, multi_doc: bool, count: int, probes: int) -> Chosen:
    """Searches the lists of one head."""
    (I, S), Q = lists.slots.shape, len(q_QH)
    C, probes = len(lists.centroids), min(probes, I)
    s_QC = jnp.einsum("qh,ch->qc", q_QH, lists.centroids, preferred_element_type=jnp.float32)
    s_QI = jnp.where(lists.owner < C, s_QC[:, jnp.minimum(lists.owner, C - 1)], -jnp.inf)
    list_X = jax.lax.top_k(s_QI, probes)[1].reshape(-1)  # X pairs of query and list
    order_X = jnp.argsort(list_X)
    sorted_X = list_X[order_X]
    # Where each list's pairs begin, and its tiles of them.
    begin_I = jnp.searchsorted(sorted_X, jnp.arange(I + 1))
    tile = min(_TILE, Q)
    last_I = jnp.cumsum(-(-jnp.diff(begin_I) // tile))
    padded_X = jnp.pad(order_X, (0, tile)) // probes

    def visit(number, scores):
        which = jnp.searchsorted(last_I, number, side="right")
        tiles = last_I[which] - jnp.where(which > 0, last_I[which - 1], 0)
        first = begin_I[which] + (number - last_I[which] + tiles) * tile
        query = jax.lax.dynamic_slice_in_dim(padded_X, first, tile)
        slot_S = lists.slots[which]
        documents_S = jnp.take(documents_M, slot_S, mode="fill", fill_value=-1)
        s = jnp.einsum(
            "qh,sh->qs", q_QH[query], jnp.take(keys_MH, slot_S, axis=0, mode="clip"), preferred_element_type=jnp.float32
        )
        seen = chosen.query_visible(documents_S[None], documents_Q[query][:, None], multi_doc)
        # A tile's rows past its list's pairs are overwritten by the tiles that follow.
        return jax.lax.dynamic_update_slice_in_dim(scores, jnp.where(seen, s, -jnp.inf), first, 0)

    scores = jax.lax.fori_loop(0, last_I[-1], visit, jnp.full((len(order_X) + tile, S), -jnp.inf))
    place_X = jnp.zeros_like(order_X).at[order_X].set(jnp.arange(len(order_X)))
    candidates = scores[place_X].reshape(Q, probes * S)
    found = min(count, probes * S)
    score, choice = jax.lax.top_k(candidates, found)
    index = lists.slots[jnp.take_along_axis(list_X.reshape(Q, probes), choice // S, 1), choice % S]
    rest = ((0, 0), (0, count - found))
    return Chosen(jnp.pad(index, rest), jnp.pad(score, rest, constant_values=-jnp.inf))
