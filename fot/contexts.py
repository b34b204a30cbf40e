"""Attention of rows to the contexts that a crossbatch table names (FoT, section 3.2), in plain JAX.

A running log-sum-exp joins columns and the stops of a ring, and the backward pass recomputes each from it: neither ever
holds the logits, or an output, of more than one column.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fot import attention, ring
from fot.attention import Partial, Running, Tokens
from fot.config import ModelConfig
from fot.crossbatch import Table
from fot.ring import Trip
from fot.sharding import MESH_AXES, ROWS


@jax.named_scope("contexts")
def attend_contexts(
    q_ATNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    queries: Tokens,
    tokens: Tokens,
    table: Table,
    block: int,
    exchange: str = ModelConfig.attention_exchange,
) -> Partial:
    """Attention of each row to the contexts that its table names, one column at a time (FoT, section 3.2).

    Gradients flow into every key and value, also into those of other devices.

    Args:
      q_ATNH: queries, already scaled, of any A rows.
      k_BTGH: keys of all rows, as other rows see them.
      v_BTGH: values.
      queries: [A, T], tokens of the queries.
      tokens: [B, T], tokens of the keys.
      table: static; its rows are those of the queries.
      block: queries per block, in tokens.
      exchange: how contexts of other devices come, as in `ModelConfig`.

    Returns:
      Partial attention over all columns.
    """
    chex.assert_equal_shape_prefix([q_ATNH, table.contexts_BC], 1)
    route = ring.route(table, len(k_BTGH), exchange)
    counts = tuple(tuple(_counts(each, route.trip.shards).tolist()) for each in route.tables)
    walk = _Walk(route.trip, counts, block)

    def here(with_heads, of_rows):
        q, k, v = with_heads
        queries, tokens, tables = of_rows
        k, v, tokens = route.bring((k, v, tokens))
        keys = k.swapaxes(1, 2), v.swapaxes(1, 2)
        out, lse = _attend(attention.split_heads(q, k.shape[2]), *keys, queries, tokens, tables, walk)
        return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])

    arrays = (q_ATNH, k_BTGH, v_BTGH), (queries, tokens, route.tables)
    if route.axis is None:
        return here(*arrays)
    return route.over_devices(here, *arrays, axes=(*ROWS, MESH_AXES["heads"]))


def _counts(table: Table, shards: int) -> np.ndarray:
    """Returns how many contexts each row of a shard sees, at most, on any shard."""
    return (table.contexts_BC >= 0).sum(1).reshape(shards, -1).max(0)


def alike(count_A: np.ndarray) -> list[np.ndarray]:
    """Groups the rows that see anything by how many contexts they see, in quarters of the most, so that few see none.

    In packs the first rows see few contexts and the last ones many: all at once, half of the work would be for nothing.
    """
    quarter_A = -(-4 * count_A // max(count_A.max(initial=0), 1))
    return [np.flatnonzero(quarter_A == quarter).astype(np.int32) for quarter in range(1, 5) if quarter in quarter_A]


class _Walk(NamedTuple):
    """What is known when tracing.

    Attributes:
      trip: where contexts are.
      counts: for each stop, how many columns each row needs there, on any device.
      block: queries per block, in tokens.
    """

    trip: Trip
    counts: tuple[tuple[int, ...], ...]
    block: int

    def groups(self, stop: int) -> list[tuple[np.ndarray, int]]:
        """Returns rows that see about as many contexts at a stop, each group with the columns that it needs."""
        count_A = np.array(self.counts[stop], int)
        return [(rows_A, int(count_A[rows_A].max())) for rows_A in alike(count_A)]


class _Held(NamedTuple):
    """A shard's keys and values [B, G, T, H], and its tokens [B, T]."""

    k: jax.Array
    v: jax.Array
    tokens: Tokens


class _Columns(NamedTuple):
    """The table as scan inputs."""

    keys_CA: jax.Array
    others_CA: jax.Array


def _some(tree, rows_A: np.ndarray):
    """Returns these rows of every array."""
    return jax.tree.map(lambda x: x if len(rows_A) == len(x) else x[rows_A], tree)


def _put(tree, rows_A: np.ndarray, part):
    """Returns the arrays with `part` in these rows."""

    def put(x, part):
        return part if len(rows_A) == len(x) else x.at[rows_A].set(part, unique_indices=True)

    return jax.tree.map(put, tree, part)


def _columns(table: Table, rows_A: np.ndarray, count: int) -> _Columns:
    contexts_AC, negative_AC = (jnp.asarray(x)[:, :count] for x in table)
    return _Columns(_some(contexts_AC, rows_A).T, _some(negative_AC, rows_A).T)


def _rows(x: jax.Array, rows_A: jax.Array, fill: int) -> jax.Array:
    """Gathers rows of x; `fill` for row -1."""
    return x.at[rows_A].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def _column(held: _Held, rows_A: jax.Array) -> _Held:
    tokens = Tokens(_rows(held.tokens.documents, rows_A, -1), _rows(held.tokens.positions, rows_A, 0))
    return _Held(_rows(held.k, rows_A, 0), _rows(held.v, rows_A, 0), tokens)


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, length)) for i in range(0, length, block)]


def _visible(queries: Tokens, here: slice, keys: Tokens, others_A: jax.Array) -> jax.Array:
    return attention.visible(Tokens(queries.documents[:, here], queries.positions[:, here]), keys, others_A)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, queries, tokens, tables, walk):
    """q [A, G, R, T, H], k and v [B, G, T, H] → out [A, G, R, T, H], lse [A, G, R, T]."""
    parts = _blocks(q.shape[3], walk.block)

    def visit(running: list[Running], held: _Held, stop: int) -> list[Running]:
        for rows_A, count in walk.groups(stop):
            some, columns = _some((running, q, queries), rows_A), _columns(tables[stop], rows_A, count)
            running = _put(running, rows_A, _accumulate(*some, held, columns, parts))
        return running

    running = [attention.start(q[..., here, :]) for here in parts]
    running = ring.go(walk.trip, running, _Held(k, v, tokens), visit)
    outs, lses = zip(*map(attention.finish, running), strict=True)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _accumulate(running: list[Running], q, queries: Tokens, held: _Held, columns: _Columns, parts: list[slice]):
    """Takes columns of contexts into the running softmax of each block of queries."""

    def step(running, column):
        keys = _column(held, column.keys_CA)

        def update(state, here):
            seen = _visible(queries, here, keys.tokens, column.others_CA)
            return attention.accumulate(state, attention.logits(q[..., here, :], keys.k, seen), keys.v)

        return [update(state, here) for state, here in zip(running, parts, strict=True)], None

    return jax.lax.scan(step, running, columns)[0]


def _attend_forward(q, k, v, queries, tokens, tables, walk):
    out, lse = checkpoint_name(_attend(q, k, v, queries, tokens, tables, walk), attention.OUTPUT)
    return (out, lse), (q, k, v, queries, tokens, tables, out, lse)


class _Known(NamedTuple):
    """What the gradients of queries [A, T] take, as for `attention.block_gradients`."""

    q: jax.Array
    lse: jax.Array
    delta: jax.Array
    dout: jax.Array
    queries: Tokens


def _attend_backward(walk, saved, cotangents):
    q, k, v, queries, tokens, tables, out, lse = saved
    dout, dlse = cotangents
    known = _Known(q, lse, (dout * out).sum(-1) - dlse, dout, queries)
    parts = _blocks(q.shape[3], walk.block)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)

    def visit(dqs, held: _Held, stop: int):
        dk, dv = zeros(k.shape), zeros(v.shape)
        for rows_A, count in walk.groups(stop):
            columns, carry = _columns(tables[stop], rows_A, count), (_some(dqs, rows_A), dk, dv)
            part, dk, dv = _gradients(carry, _some(known, rows_A), held, columns, parts)
            dqs = _put(dqs, rows_A, part)
        return dqs, (dk, dv)

    dqs = [zeros(q[..., here, :].shape) for here in parts]
    dqs, (dk, dv) = ring.go_back(walk.trip, dqs, _Held(k, v, tokens), visit)
    dq = jnp.concatenate(dqs, axis=3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


def _gradients(carry, known: _Known, held: _Held, columns: _Columns, parts: list[slice]):
    """Adds the gradients of columns of contexts to those of the blocks of queries, of keys and of values."""

    def step(carry, column):
        dqs, dk, dv = carry
        keys = _column(held, column.keys_CA)
        grads = [
            attention.block_gradients(
                known.q[..., here, :],
                keys.k,
                keys.v,
                _visible(known.queries, here, keys.tokens, column.others_CA),
                known.lse[..., here],
                known.delta[..., here],
                known.dout[..., here, :],
            )
            for here in parts
        ]
        scatter = dict(mode="drop", wrap_negative_indices=False)
        dk = dk.at[column.keys_CA].add(sum(g.k for g in grads), **scatter)
        dv = dv.at[column.keys_CA].add(sum(g.v for g in grads), **scatter)
        return ([dq + g.q for dq, g in zip(dqs, grads, strict=True)], dk, dv), None

    return jax.lax.scan(step, carry, columns)[0]


_attend.defvjp(_attend_forward, _attend_backward)
