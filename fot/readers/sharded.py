"""Attention to a memory whose slots are spread over devices: each reads its own, and only results meet.

The mesh is that of `jax.set_mesh`, the axis `sharding.SLOTS`. Of a query, every device learns the output of the others
together and, for top-k readers, their k largest logits; never a key or a value.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fot import attention
from fot.attention import Partial
from fot.memory import Slots, Stack
from fot.readers import chosen, knn
from fot.readers.dense import dense
from fot.readers.reader import Reader
from fot.sharding import SLOTS

Read = Callable[[jax.Array, jax.Array, Slots, Reader], Partial]


def sharded_dense(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to every visible slot, as `dense`; each device reads its slots."""
    return _spread(dense, q_BTNH, documents_BT, slots, reader)


def sharded_knn(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product, as `knn`; each device proposes k of its slots."""
    return _spread(_knn, q_BTNH, documents_BT, slots, reader)


def _knn(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to those of a device's slots that are among the k nearest of all."""
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    own = knn.nearest(q, documents_BT, slots, reader)
    count = own.index.shape[-1]
    if count == 0:
        return chosen.attend(q, slots, own)
    all_s = jax.lax.all_gather(own.score, SLOTS, axis=own.score.ndim - 1, tiled=True)
    # Devices in the order of their slots: of equal logits the lower slot wins.
    _, choice = jax.lax.top_k(all_s, min(reader.neighbours, all_s.shape[-1]))
    place = jax.lax.axis_index(SLOTS) * count + jnp.arange(count)
    among = (choice[..., None, :] == place[:, None]).any(-1)
    return chosen.attend(q, slots, own._replace(score=jnp.where(among, own.score, -jnp.inf)))


def _spread(read: Read, q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Joins what each device reads of its slots."""
    keys, stacked, whole = PartitionSpec(None, None, SLOTS), PartitionSpec(None, None, None, SLOTS), PartitionSpec()
    split = Slots(keys, keys, PartitionSpec(None, SLOTS), stack=slots.stack and Stack(stacked, stacked, whole))
    here = functools.partial(_read_and_join, read, reader=reader)
    # Manual over this one axis: rows and heads stay spread as they are. Readers start their loops from constants,
    # which the check of what varies over devices does not allow.
    spread = jax.shard_map(here, in_specs=(whole, whole, split), out_specs=whole, axis_names={SLOTS}, check_vma=False)
    return spread(q_BTNH, documents_BT, slots)


def _read_and_join(read: Read, q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, *, reader: Reader) -> Partial:
    """`attention.merge` of the devices' parts, in three sums over devices."""
    part = read(q_BTNH, documents_BT, slots, reader)
    top = attention.finite(jax.lax.pmax(jax.lax.stop_gradient(part.lse), SLOTS))
    share = jnp.exp(part.lse - top)
    total = jax.lax.psum(share, SLOTS)
    out = jax.lax.psum(part.out * share[..., None], SLOTS) / jnp.where(total > 0, total, 1.0)[..., None]
    return Partial(out, top + jnp.log(total))
