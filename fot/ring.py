"""How contexts of other devices come: by one all-gather, or shard by shard around a ring of devices.

Rows lie in equal shards over the devices. Tables are static, so how many shards after its query's a context lies, its
offset, is known when tracing. On a trip each device begins with its own shard of keys and goes from offset to offset,
past those that no device needs; all go the same way, so each step is one `ppermute`. Shards that see but each other's
rows, as those of a group of packs do, are a ring of their own. The next shard is on its way while this one is attended
to. Backward is a second trip, on which gradients of keys travel with the keys and then home (Liu,
Zaharia and Abbeel, 2023: Ring Attention). A device holds two shards of keys at a time, however many stops there are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fot import sharding
from fot.crossbatch import Table
from fot.sharding import ROWS


class Trip(NamedTuple):
    """Where to go.

    Attributes:
      shards: over which the rows of tables are split; 1 where they are not split.
      ring: shards of a ring; so many side by side are one.
      offsets: in shards, in the order of the trip; the first is 0, the device's own.
    """

    shards: int
    ring: int
    offsets: tuple[int, ...]


class Route(NamedTuple):
    """Where the contexts of a table lie, and how they come.

    Attributes:
      axis: mesh axes over which queries and rows are split; None if they are not.
      gathers: all rows are brought to each device before; the trip is one stop then.
      trip: where to go.
      tables: what queries see at each stop: contexts numbered within the shard there, each row's in its first columns.
      rows: that there are at each stop.
    """

    axis: tuple[str, ...] | None
    gathers: bool
    trip: Trip
    tables: tuple[Table, ...]
    rows: int

    def bring(self, tree: Any) -> Any:
        """Returns the rows that a device can see at the first stop, of those that it has; inside `over_devices`."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, ROWS, tiled=True), tree) if self.gathers else tree

    def over_devices(self, f: Callable, with_heads: Any, of_rows: Any, axes: tuple[str, ...]) -> Any:
        """Lets each device run f(with_heads, of_rows) on the rows and heads that it has.

        Args:
          f: may use collectives over `ROWS`.
          with_heads: arrays [rows, T, heads, …], as those that f returns.
          of_rows: arrays whose first axis is split as rows are.
          axes: as for `sharding.over_devices`.
        """
        rows, heads = PartitionSpec(self.axis), PartitionSpec(self.axis, None, sharding.MESH_AXES["heads"])
        spread = sharding.over_devices(f, in_specs=(heads, rows), out_specs=heads, axes=axes)
        return spread(with_heads, of_rows)


def route(table: Table, rows: int, exchange: str) -> Route:
    """Returns how the contexts of a table come to its queries on the mesh of `jax.set_mesh`.

    Args:
      table: of A queries, which are split over the devices as the rows are.
      rows: that the contexts are of.
      exchange: as in `ModelConfig.attention_exchange`; nothing is exchanged where contexts are of their query's shard.
    """
    shards = sharding.row_shards()
    if not (sharding.rows_of(len(table.contexts_BC)) and sharding.rows_of(rows)):
        return Route(None, False, Trip(1, 1, (0,)), (_filled(table),), rows)
    shard_BC = table.contexts_BC // (rows // shards)
    own_B1 = np.arange(len(shard_BC))[:, None] * shards // len(shard_BC)
    seen_BC = table.contexts_BC >= 0
    ring = next(n for n in range(1, shards + 1) if shards % n == 0 and (shard_BC // n == own_B1 // n)[seen_BC].all())
    offset_BC = (shard_BC - own_B1) % ring
    needed = sorted({0, *np.unique(offset_BC[seen_BC]).tolist()})
    if needed != [0] and exchange == "gather":
        return Route(ROWS, True, Trip(shards, shards, (0,)), (_filled(table),), rows)
    trip, each = Trip(shards, ring, _order(needed, ring)), rows // shards
    return Route(ROWS, False, trip, tuple(_at(table, offset_BC == offset, each) for offset in trip.offsets), each)


def _order(needed: list[int], ring: int) -> tuple[int, ...]:
    """Returns the offsets in the order of a trip from 0 that goes to the nearest each time, either way."""
    order, left = [0], {*needed} - {0}
    while left:
        order.append(min(left, key=lambda to: (min((to - order[-1]) % ring, (order[-1] - to) % ring), to)))
        left.remove(order[-1])
    return tuple(order)


def _at(table: Table, here_BC: np.ndarray, each: int) -> Table:
    """Returns the contexts of the table that are here, in as few columns as there can be."""
    here_BC = here_BC & (table.contexts_BC >= 0)
    contexts_BC = np.where(here_BC, table.contexts_BC % each, -1).astype(np.int32)
    columns = here_BC.sum(1).max(initial=0)
    return Table(*(x[:, :columns] for x in _filled(Table(contexts_BC, table.negative_BC & here_BC))))


def _filled(table: Table) -> Table:
    """Returns the table with each row's contexts in its first columns."""
    order_BC = np.argsort(table.contexts_BC < 0, axis=1, kind="stable")
    return Table(*(np.take_along_axis(x, order_BC, 1) for x in table))


def go(trip: Trip, state: Any, held: Any, visit: Callable[[Any, Any, int], Any]) -> Any:
    """Returns the state after all stops of a trip.

    Args:
      trip: where to go.
      state: before it.
      held: arrays of the device's own shard.
      visit: (state, arrays of the shard there, number of the stop) -> state.
    """
    for stop in range(len(trip.offsets)):
        coming = _next(trip, stop, held)
        state = visit(state, held, stop)
        # Without a barrier all shards could be on their way at once.
        state, held = _together(trip, stop, (state, coming))
    return state


def go_back(trip: Trip, state: Any, held: Any, visit: Callable[[Any, Any, int], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Returns the state after all stops, and the sum of what the device's own shard got at each.

    Args:
      trip: where to go.
      state: before it.
      held: arrays of the device's own shard.
      visit: (state, arrays of the shard there, number of the stop) -> (state, gradients of that shard).
    """
    travelling = None
    for stop in range(len(trip.offsets)):
        coming = _next(trip, stop, held)
        travelling = None if stop == 0 else _move(travelling, trip.offsets[stop] - trip.offsets[stop - 1], trip)
        state, gradients = visit(state, held, stop)
        travelling = gradients if stop == 0 else jax.tree.map(jnp.add, travelling, gradients)
        state, held, travelling = _together(trip, stop, (state, coming, travelling))
    return state, _move(travelling, -trip.offsets[-1], trip)


def _next(trip: Trip, stop: int, held: Any) -> Any:
    """Sends for what the next stop has; after the last one there is nothing to send for."""
    last = stop + 1 == len(trip.offsets)
    return held if last else _move(held, trip.offsets[stop + 1] - trip.offsets[stop], trip)


def _together(trip: Trip, stop: int, tree: Any) -> Any:
    return tree if stop + 1 == len(trip.offsets) else jax.lax.optimization_barrier(tree)


def _move(tree: Any, steps: int, trip: Trip) -> Any:
    """Gives each device the arrays of the one so many shards on in its ring."""
    if steps % trip.ring == 0:
        return tree
    place = [divmod(shard, trip.ring) for shard in range(trip.shards)]
    pairs = [(shard, ring * trip.ring + (at - steps) % trip.ring) for shard, (ring, at) in enumerate(place)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ROWS, pairs), tree)
