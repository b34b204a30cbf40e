"""An inverted file over the keys of a memory: spherical k-means, and lists of slots by their nearest centroid.

`build` finds centroids and lists all entries; `refresh` lists the entries that came since under the centroids there
are. What an index doesn't know yet, and what was overwritten since, "clustered" reads exactly (see `Slots.listed`),
so no entry is ever lost. A cluster that outgrows a list goes on in another one; lists suffice for any clusters.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fot.memory import Index, Lists, Memory
from fot.sharding import MESH_AXES, ROWS, over_devices

_LISTS = 2  # of a cluster, when they are full: more centroids would cost more than they find
_ROUNDS = 6  # of k-means
_AXIS_ROUNDS = 3  # of power iteration
_SAMPLES = 32  # keys per centroid that k-means sees
_SCORES = 2**24  # scores of keys by centroids that exist at once, 64 MiB


def build(memory: Memory, list_size: int) -> Memory:
    """Finds centroids, about one for `_LISTS` lists of `list_size` slots, and lists all entries.

    Cost: `_ROUNDS` · `_SAMPLES` · C² · H multiplications a layer, row and head for the centroids, M · C · H for the
    lists. Call it again when the memory has grown by much: the centroids are those of what it held.
    """
    M = memory.capacity
    C = max(1, -(-M // (_LISTS * list_size)))
    count = min(M, C * _SAMPLES)
    # Steps of the golden ratio: evenly over the filled slots, and at no one place of windows or lines.
    share_S = (jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(2654435769)).astype(jnp.float32) / 2.0**32
    place_BS = jnp.minimum((share_S * memory.length[:, None]).astype(jnp.int32), M - 1)
    sample = jnp.take_along_axis(memory.keys, place_BS[None, :, None, :, None], 3).astype(jnp.float32)
    centroids = _unit(sample[:, :, :, :C])

    def improve(_, centroids):
        sums = _per_head(_sums)(sample, _nearest(sample, centroids), centroids)
        # A centroid that lost all keys stays.
        return jnp.where((sums != 0).any(-1, keepdims=True), _unit(sums), centroids)

    centroids = jax.lax.fori_loop(0, _ROUNDS, improve, centroids)
    axes = _per_head(_axes)(sample, _nearest(sample, centroids), centroids)
    centroids, axes = (x.astype(memory.keys.dtype) for x in (centroids, axes))
    return memory._replace(index=_index(memory, centroids, axes, _nearest(memory.keys, centroids), list_size))


def refresh(memory: Memory, list_size: int) -> Memory:
    """Lists the entries that were written since, under the centroids there are.

    `list_size` is that of `build`.
    """
    lists, M = memory.index.lists, memory.capacity
    old_BM = memory.entries < memory.index.covered[:, None]
    size = min(_block(lists.centroids), M)

    def visit(cluster, first):
        start = jnp.minimum(first, M - size)

        def assign(cluster):
            new = _nearest(jax.lax.dynamic_slice_in_dim(memory.keys, start, size, 3), lists.centroids)
            return jax.lax.dynamic_update_slice_in_dim(cluster, new, start, 3)

        new = ~jax.lax.dynamic_slice_in_dim(old_BM, start, size, 1)
        return jax.lax.cond(new.any(), assign, lambda cluster: cluster, cluster), None

    cluster = jax.lax.scan(visit, lists.cluster, jnp.arange(0, M, size))[0]
    return memory._replace(index=_index(memory, lists.centroids, lists.axes, cluster, list_size))


def _index(memory: Memory, centroids: jax.Array, axes: jax.Array, cluster: jax.Array, list_size: int) -> Index:
    C = centroids.shape[3]
    cluster = jnp.where((memory.entries >= 0)[None, :, None], cluster, C)
    lists = _per_head(lambda *head: _lists(*head, list_size))(centroids, axes, cluster, memory.keys)
    return Index(lists, memory.written)


def _lists(
    centroids_CH: jax.Array, axes_CH: jax.Array, cluster_M: jax.Array, keys_MH: jax.Array, list_size: int
) -> Lists:
    """Returns the lists of one head."""
    C, M = len(centroids_CH), len(cluster_M)
    count_C = jnp.bincount(cluster_M, length=C)
    # Along the axis of their cluster, so that each of its lists is tighter than the whole.
    along_M = (keys_MH * axes_CH[jnp.minimum(cluster_M, C - 1)]).sum(-1)
    order_M = jnp.lexsort((along_M, cluster_M))
    end_C = jnp.cumsum(-(-count_C // list_size))
    # A cluster has at the most one list that isn't full.
    list_I = jnp.arange(C + M // list_size)
    owner_I = jnp.searchsorted(end_C, list_I, side="right")
    known_I = jnp.minimum(owner_I, C - 1)
    past_I = (list_I - end_C[known_I]) * list_size + -(-count_C // list_size)[known_I] * list_size
    begin_I = (jnp.cumsum(count_C) - count_C)[known_I] + past_I
    length_I = jnp.where(owner_I < C, jnp.minimum(count_C[known_I] - past_I, list_size), 0)
    order_M, begin_I, length_I = (x.astype(jnp.int32) for x in (order_M, begin_I, length_I))
    keys_MH = keys_MH[order_M]
    mean_IH, spread_I = _moments(keys_MH, begin_I, length_I, list_size)
    return Lists(centroids_CH, axes_CH, cluster_M, order_M, keys_MH, mean_IH, spread_I, begin_I, length_I)


def _moments(
    keys_MH: jax.Array, begin_I: jax.Array, length_I: jax.Array, list_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of each list's keys, and their root mean square distance from it; keys are in their order."""
    M = len(keys_MH)
    size = min(list_size, M)

    def moments(each):
        begin, length = each
        start = jnp.minimum(begin, M - size)
        place_S = start + jnp.arange(size)
        weight_S = ((place_S >= begin) & (place_S < begin + length)) / jnp.maximum(length, 1)
        part_SH = jax.lax.dynamic_slice_in_dim(keys_MH, start, size).astype(jnp.float32)
        mean_H = (weight_S[:, None] * part_SH).sum(0)
        return mean_H, jnp.sqrt((weight_S[:, None] * jnp.square(part_SH - mean_H)).sum())

    mean_IH, spread_I = jax.lax.map(moments, (begin_I, length_I))
    return mean_IH.astype(keys_MH.dtype), spread_I


def _per_head(function: Callable) -> Callable:
    """Lets a function of one head run on each [L, B, G] in turn: side by side, a head's slices would become gathers."""

    def heads(*arrays: jax.Array):
        some = arrays[0].shape[:3]
        flat = tuple(x.reshape(-1, *x.shape[3:]) for x in arrays)
        made = jax.lax.map(lambda each: function(*each), flat)
        return jax.tree.map(lambda x: x.reshape(*some, *x.shape[1:]), made)

    here = PartitionSpec(None, ROWS, MESH_AXES["kv_heads"])
    return over_devices(heads, in_specs=here, out_specs=here)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20)


def _block(centroids: jax.Array) -> int:
    """How many keys of each head are scored at once."""
    return max(1, _SCORES // (centroids.size // centroids.shape[-1]))


def _sums(keys_SH: jax.Array, cluster_S: jax.Array, centroids_CH: jax.Array) -> jax.Array:
    return jnp.zeros_like(centroids_CH).at[cluster_S].add(keys_SH)


def _axes(keys_SH: jax.Array, cluster_S: jax.Array, centroids_CH: jax.Array) -> jax.Array:
    """Returns the direction [C, H] in which each cluster's keys are spread most, by power iteration."""
    count_C = jnp.maximum(jnp.bincount(cluster_S, length=len(centroids_CH)), 1)
    mean_CH = _sums(keys_SH, cluster_S, centroids_CH) / count_C[:, None]
    away_SH = keys_SH - mean_CH[cluster_S]

    def improve(_, axes_CH):
        along_S = (away_SH * axes_CH[cluster_S]).sum(-1)
        return _unit(_sums(away_SH * along_S[:, None], cluster_S, centroids_CH))

    return jax.lax.fori_loop(0, _AXIS_ROUNDS, improve, jax.random.normal(jax.random.key(0), centroids_CH.shape))


def _nearest(keys: jax.Array, centroids: jax.Array) -> jax.Array:
    """Returns the centroid [L, B, G, S] of largest inner product of each key [L, B, G, S, H]."""
    S = keys.shape[3]
    size = min(_block(centroids), S)

    def visit(nearest, first):
        start = jnp.minimum(first, S - size)
        block = jax.lax.dynamic_slice_in_dim(keys, start, size, 3)
        s = jnp.einsum("lbgch,lbgsh->lbgcs", centroids, block, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(nearest, s.argmax(3).astype(jnp.int32), start, 3), None

    return jax.lax.scan(visit, jnp.zeros(keys.shape[:-1], jnp.int32), jnp.arange(0, S, size))[0]
