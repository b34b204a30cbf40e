"""An inverted file over the keys of a memory: spherical k-means, and lists of slots by their nearest centroid.

`build` finds centroids and lists all entries; `refresh` lists the entries that came since under the centroids there
are. What an index doesn't know yet, and what was overwritten since, "clustered" reads exactly (see `Slots.listed`),
so no entry is ever lost. A cluster that outgrows a list goes on in another one; lists suffice for any clusters.
"""

import jax
import jax.numpy as jnp

from fot.memory import Index, Lists, Memory

_ROUNDS = 6  # of k-means
_SAMPLES = 64  # keys per centroid that k-means sees
_SCORES = 2**24  # scores of keys by centroids that exist at once, 64 MiB


def build(memory: Memory, list_size: int) -> Memory:
    """Finds centroids, about one for `list_size` slots, and lists all entries.

    Cost: `_ROUNDS` · `_SAMPLES` · C² · H multiplications a layer, row and head for the centroids, M · C · H for the
    lists. Call it again when the memory has grown by much: the centroids are those of what it held.
    """
    M = memory.capacity
    C = max(1, -(-M // list_size))
    count = min(M, C * _SAMPLES)
    # Evenly over the filled slots.
    place_BS = (jnp.arange(count) * (memory.length[:, None] / count)).astype(jnp.int32)
    sample = jnp.take_along_axis(memory.keys, place_BS[None, :, None, :, None], 3).astype(jnp.float32)
    centroids = _unit(jnp.take_along_axis(sample, (jnp.arange(C) * count // C)[None, None, None, :, None], 3))

    def improve(_, centroids):
        sums = _per_head(_sums)(sample, _nearest(sample, centroids), centroids)
        # A centroid that lost all keys stays.
        return jnp.where((sums != 0).any(-1, keepdims=True), _unit(sums), centroids)

    centroids = jax.lax.fori_loop(0, _ROUNDS, improve, centroids).astype(memory.keys.dtype)
    cluster = _nearest(memory.keys, centroids)
    return memory._replace(index=_index(memory, centroids, cluster, list_size))


def refresh(memory: Memory) -> Memory:
    """Lists the entries that were written since, under the centroids there are."""
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
    return memory._replace(index=_index(memory, lists.centroids, cluster, lists.slots.shape[-1]))


def _index(memory: Memory, centroids: jax.Array, cluster: jax.Array, list_size: int) -> Index:
    C, M = centroids.shape[3], memory.capacity
    cluster = jnp.where((memory.entries >= 0)[None, :, None], cluster, C)
    # Each cluster has one list that isn't full at the most.
    lists = C + M // list_size
    owner, slots = _per_head(lambda cluster_M: _lists(cluster_M, C, lists, list_size))(cluster)
    return Index(Lists(centroids, cluster, owner, slots), memory.written)


def _lists(cluster_M: jax.Array, C: int, lists: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns owner [I] and slots [I, S] of one head."""
    M = len(cluster_M)
    order_M = jnp.argsort(cluster_M)
    cluster_M = cluster_M[order_M]
    count = jnp.bincount(cluster_M, length=C)
    needed = -(-count // size)
    end = jnp.cumsum(needed)
    known = jnp.minimum(cluster_M, C - 1)
    rank_M = jnp.arange(M) - (jnp.cumsum(count) - count)[known]
    list_M = jnp.where(cluster_M < C, (end - needed)[known] + rank_M // size, lists)
    slots = jnp.full((lists, size), M).at[list_M, rank_M % size].set(order_M, mode="drop")
    return jnp.searchsorted(end, jnp.arange(lists), side="right").astype(jnp.int32), slots


def _per_head(function):
    """Maps a function of one head over layers, rows and heads."""
    return jax.vmap(jax.vmap(jax.vmap(function)))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20)


def _block(centroids: jax.Array) -> int:
    """How many keys of each head are scored at once."""
    return max(1, _SCORES // (centroids.size // centroids.shape[-1]))


def _sums(keys_SH: jax.Array, cluster_S: jax.Array, centroids_CH: jax.Array) -> jax.Array:
    return jnp.zeros_like(centroids_CH).at[cluster_S].add(keys_SH)


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
