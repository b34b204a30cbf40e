"""Inverted files of FAISS over a memory on the host, for memories that are too large to be read whole.

`build` finds centroids and lists all entries; `refresh` lists the entries that came since and strikes those that were
overwritten. What an inverted file doesn't know yet "host_lists" reads exactly, so no entry is ever lost.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from fot.attention import Partial
from fot.readers import host
from fot.readers.host import Head, HostMemory, HostSlots
from fot.readers.reader import Reader

_ROUNDS = 6  # of k-means
_SAMPLES = 64  # keys per centroid that k-means sees


class HeadLists(NamedTuple):
    """The inverted file of one layer, row and head.

    Attributes:
      index: a FAISS index that numbers keys by their slots; it holds numbers as wide as the keys'.
      written: entries that the row had taken when they were listed; those that came since are not.
    """

    index: Any
    written: int


def host_lists(q_BTNH: jax.Array, documents_BT: jax.Array, slots: HostSlots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product among those that were looked at, as "clustered".

    FAISS looks at the `reader.probes` lists whose centroids have the largest inner product with the query. There is no
    gradient.
    """
    return host.attend(q_BTNH, documents_BT, slots, reader, _nearest)


def build(memory: HostMemory, list_size: int) -> HostMemory:
    """Finds centroids, about one for `list_size` entries, and lists all entries; in place."""
    for place, head in host.heads(memory):
        memory.lists.pop(place, None)
        if len(head.keys):
            memory.lists[place] = HeadLists(_trained(head.keys, list_size), 0)
    return refresh(memory, list_size)


def refresh(memory: HostMemory, list_size: int) -> HostMemory:
    """Lists what was written since, under the centroids there are, and strikes what was overwritten; in place.

    `list_size` is that of `build`.
    """
    import faiss

    for place, head in host.heads(memory):
        if head.lists is None:
            continue
        index, new = head.lists.index, _new(head)
        overwritten = new[new < head.lists.written]
        if len(overwritten):
            index.remove_ids(faiss.IDSelectorBatch(overwritten))
        if len(new):
            index.add_with_ids(np.ascontiguousarray(head.keys[new], np.float32), new)
        memory.lists[place] = HeadLists(index, head.written)
    return memory


def _trained(keys: np.ndarray, list_size: int) -> Any:
    """Returns an index with centroids and no keys."""
    import faiss

    count, H = -(-len(keys) // list_size), keys.shape[1]
    inner = faiss.METRIC_INNER_PRODUCT
    halves = {"bfloat16": faiss.ScalarQuantizer.QT_bf16, "float16": faiss.ScalarQuantizer.QT_fp16}
    half = halves.get(keys.dtype.name)
    index = (
        faiss.IndexIVFFlat(faiss.IndexFlatIP(H), H, count, inner)
        if half is None
        else faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(H), H, count, half, inner, False)
    )
    index.by_residual = False
    index.cp.spherical, index.cp.niter = True, _ROUNDS
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _SAMPLES
    # Evenly over all entries, which are in the order of the text.
    some = np.unique(np.linspace(0, len(keys) - 1, min(len(keys), count * _SAMPLES)).astype(int))
    index.train(np.ascontiguousarray(keys[some], np.float32))
    return index


def _new(head: Head) -> np.ndarray:
    """Returns the slots of the entries that came since the head's entries were listed; the oldest entry first."""
    filled = len(head.keys)
    return np.arange(max(head.lists.written, head.written - filled), head.written) % max(filled, 1)


def _nearest(
    queries: np.ndarray, head: Head, visible: np.ndarray | None, reader: Reader
) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and slots [Q, K] of the nearest visible keys that were looked at; -inf stands for nothing."""
    import faiss

    if head.lists is None:
        return host.nearest(queries, head, visible, reader)
    new, count = _new(head), len(head.keys)
    listed = faiss.IDSelectorNot(faiss.IDSelectorBatch(new)) if len(new) else None
    if visible is not None:
        unlisted = np.isin(visible, new)
        count, new, listed = len(visible), visible[unlisted], faiss.IDSelectorBatch(visible[~unlisted])
    count -= len(new)
    found = []
    if count:
        how = faiss.SearchParametersIVF(nprobe=reader.probes, sel=listed)
        s, index = head.lists.index.search(queries, min(reader.neighbours, count), params=how)
        found.append((np.where(index < 0, -np.inf, s), np.maximum(index, 0)))
    if len(new):
        found.append(host.nearest(queries, head, new, reader))
    return host.best(found, reader.neighbours)
