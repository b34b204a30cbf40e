"""Crossbatch: which contexts each row's memory layers see in training, and attention to them.

FoT, section 3.2. A variant is a static table of rows; `VARIANTS` lists the functions that make one. Rows of a batch
are numbered pack by pack: row `b·K + j` is the j-th of the K consecutive contexts of pack b's document stream.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fot import attention, sharding
from fot.attention import Partial, Tokens
from fot.config import CrossbatchConfig
from fot.sharding import ROWS


class Table(NamedTuple):
    """What the rows of a batch see of each other: static numpy arrays, for B rows and C columns.

    Attributes:
      contexts_BC: int32, row whose whole context the row sees in this column; -1 is none.
      negative_BC: bool, whether tokens of other documents are visible in this column; where not, only earlier tokens
        of the query's own document are (a positive).
    """

    contexts_BC: np.ndarray
    negative_BC: np.ndarray


def _table(seen: list[list[tuple[int, bool]]]) -> Table:
    """Builds a table from each row's list of (row, negative)."""
    columns = max(map(len, seen))
    padded = [row + [(-1, False)] * (columns - len(row)) for row in seen]
    contexts = np.array([[context for context, _ in row] for row in padded], np.int32)
    negative = np.array([[negative for _, negative in row] for row in padded], bool)
    return Table(contexts.reshape(len(seen), columns), negative.reshape(len(seen), columns))


def none(config: CrossbatchConfig, rows: int, d: int) -> Table:
    """No row sees another: standard training."""
    return _table([[] for _ in range(rows)])


def previous(config: CrossbatchConfig, rows: int, d: int) -> Table:
    """The paper's scheme: up to w previous contexts of d documents, the first of them the row's own (section 3.2).

    With packing 2 and w = 1 a pack is (C_prev, C_curr), and C_curr of pack b sees C_prev of packs b, b+1, …, b+d-1
    (cyclic). Longer packs give each row the up to w contexts before it.
    """
    K, packs = config.packing, rows // config.packing

    def seen(pack: int, place: int) -> list[tuple[int, bool]]:
        return [
            ((pack + other) % packs * K + place - back, other > 0)
            for other in range(d)
            for back in range(1, min(place, config.w) + 1)
        ]

    return _table([seen(row // K, row % K) for row in range(rows)])


def segments(config: CrossbatchConfig, rows: int, d: int) -> Table:
    """LongLLaMA's segments: the place in the pack decides the (p, n) positives and negatives (Appendix A).

    The p positives are the contexts just before the row's own; the n negatives are the rows before the pack, last
    one first, cyclically.
    """
    K = config.packing

    def seen(row: int) -> list[tuple[int, bool]]:
        positives, negatives = config.segments[row % K]
        first = row - row % K
        return [(row - back, False) for back in range(1, positives + 1)] + [
            ((first - back) % rows, True) for back in range(1, negatives + 1)
        ]

    return _table([seen(row) for row in range(rows)])


def released(config: CrossbatchConfig, rows: int, d: int) -> Table:
    """The released LongLLaMA training code: rows i-1 … i-range, never wrapping around, fewer with stepping."""
    K, reach = config.packing, config.range
    step = -(-(reach + 1) // max(K - 1, 1))

    def seen(row: int) -> list[tuple[int, bool]]:
        stepped = row % K * step if config.stepping and K > 1 else reach
        return [(row - back, row - back < row - row % K) for back in range(1, min(stepped, reach, row) + 1)]

    return _table([seen(row) for row in range(rows)])


VARIANTS: dict[str, Callable[[CrossbatchConfig, int, int], Table]] = {
    "none": none,
    "previous": previous,
    "segments": segments,
    "released": released,
}


def make_table(config: CrossbatchConfig, rows: int, d: int) -> Table:
    """Returns the table of `config.variant` for a batch of `rows` rows: that of a group, for each of `config.groups`.

    d counts for the variant "previous" alone.
    """
    each = rows // config.groups
    group = VARIANTS[config.variant](config, each, d)
    contexts_BC, negative_BC = (np.tile(x, (config.groups, 1)) for x in group)
    first_B = np.arange(rows, dtype=np.int32) // each * each
    return Table(np.where(contexts_BC < 0, -1, contexts_BC + first_B[:, None]), negative_BC)


def loss_rows(config: CrossbatchConfig) -> slice:
    """Returns the rows whose loss is taken: all, or the last of each pack (the paper's C_curr)."""
    return slice(None) if config.loss_rows == "all" else slice(config.packing - 1, None, config.packing)


def without_documents(table: Table) -> Table:
    """Returns the table with every context visible whole, as in the released code; use it with `rows_as_documents`."""
    return Table(table.contexts_BC, table.contexts_BC >= 0)


def rows_as_documents(rows: int, length: int) -> Tokens:
    """Returns tokens [rows, length] that take each row for one document, so that masks know no other boundary."""
    row_BT = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, length))
    return Tokens(row_BT, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)))


@jax.named_scope("contexts")
def attend_contexts(
    q_ATNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    queries: Tokens,
    tokens: Tokens,
    table: Table,
    block: int,
) -> Partial:
    """Attention of each row to the contexts that its table names, one column at a time (FoT, section 3.2).

    A running log-sum-exp joins the columns, and the backward pass recomputes each from it, so that neither ever holds
    the logits, or an output, of more than one column. Gradients flow into every key and value.

    Args:
      q_ATNH: queries, already scaled, of any A rows.
      k_BTGH: keys of all rows, as other rows see them.
      v_BTGH: values.
      queries: [A, T], tokens of the queries.
      tokens: [B, T], tokens of the keys.
      table: static; its rows are those of the queries.
      block: queries per block, in tokens.

    Returns:
      Partial attention over all columns.
    """
    chex.assert_equal_shape_prefix([q_ATNH, table.contexts_BC], 1)
    table, shards = _filled(table), sharding.row_shards()
    if len(q_ATNH) % shards or len(k_BTGH) % shards:
        return _attend_rows(q_ATNH, k_BTGH, v_BTGH, queries, tokens, table, _counts(table, 1), block)
    count_A, own = _counts(table, shards), of_shards(table, len(k_BTGH), shards)

    def here(q, k, v, queries, tokens, table):
        if own is None:
            k, v, tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, ROWS, tiled=True), (k, v, tokens))
        return _attend_rows(q, k, v, queries, tokens, table, count_A, block)

    rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, None, sharding.MESH_AXES["heads"])
    spread = sharding.over_devices(here, in_specs=(heads, heads, heads, rows, rows, rows), out_specs=heads)
    return spread(q_ATNH, k_BTGH, v_BTGH, queries, tokens, table if own is None else own)


def of_shards(table: Table, rows: int, shards: int) -> Table | None:
    """Returns the table with contexts numbered within the shard of the query; None if any is of another shard.

    Args:
      table: of A queries, which are split over the shards as the rows are.
      rows: that the contexts are of.
      shards: that both are split over, evenly.
    """
    each = rows // shards
    shard_A = np.arange(len(table.contexts_BC)) // (len(table.contexts_BC) // shards)
    there_AC = table.contexts_BC >= 0
    if (there_AC & (table.contexts_BC // each != shard_A[:, None])).any():
        return None
    return table._replace(contexts_BC=np.where(there_AC, table.contexts_BC % each, -1).astype(np.int32))


def _filled(table: Table) -> Table:
    """Returns the table with each row's contexts in its first columns."""
    order_BC = np.argsort(table.contexts_BC < 0, axis=1, kind="stable")
    return Table(*(np.take_along_axis(x, order_BC, 1) for x in table))


def _counts(table: Table, shards: int) -> np.ndarray:
    """Returns how many contexts each row of a shard sees, at most, on any shard."""
    return (table.contexts_BC >= 0).sum(1).reshape(shards, -1).max(0)


def alike(count_A: np.ndarray) -> list[np.ndarray]:
    """Groups the rows that see anything by how many contexts they see, in quarters of the most, so that few see none.

    In packs the first rows see few contexts and the last ones many: all at once, half of the work would be for nothing.
    """
    quarter_A = -(-4 * count_A // max(count_A.max(initial=0), 1))
    return [np.flatnonzero(quarter_A == quarter).astype(np.int32) for quarter in range(1, 5) if quarter in quarter_A]


def _attend_rows(q_ATNH, k_BTGH, v_BTGH, queries: Tokens, tokens: Tokens, table: Table, count_A, block: int) -> Partial:
    """`attend_contexts` on one device, where row a sees the contexts in the first count_A[a] columns at most."""

    def attend(rows_A: np.ndarray) -> Partial:
        """Of the queries of these rows alone, in as many columns as one of them needs."""
        contexts_AC, negative_AC = (x[rows_A, : count_A[rows_A].max()] for x in table)
        q = attention.split_heads(q_ATNH[rows_A], k_BTGH.shape[2])
        tokens_A = Tokens(queries.documents[rows_A], queries.positions[rows_A])
        columns = _Columns(jnp.asarray(contexts_AC).T, jnp.asarray(negative_AC).T, tokens_A, tokens)
        out, lse = _attend(q, k_BTGH.swapaxes(1, 2), v_BTGH.swapaxes(1, 2), columns, block)
        return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])

    groups = alike(count_A)
    if len(groups) == 1 and len(groups[0]) == len(q_ATNH):
        return attend(groups[0])
    out, lse = jnp.zeros(q_ATNH.shape, jnp.float32), jnp.full(q_ATNH.shape[:3], -jnp.inf)
    for rows_A in groups:
        part = attend(rows_A)
        out = out.at[rows_A].set(part.out, unique_indices=True)
        lse = lse.at[rows_A].set(part.lse, unique_indices=True)
    return Partial(out, lse)


class _Columns(NamedTuple):
    """The table as scan inputs, for the A rows that see anything."""

    keys_CA: jax.Array
    others_CA: jax.Array
    queries: Tokens
    tokens: Tokens


def _rows(x: jax.Array, rows_A: jax.Array, fill: int) -> jax.Array:
    """Gathers rows of x; `fill` for row -1."""
    return x.at[rows_A].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def _column(k, v, columns: _Columns, rows_A: jax.Array):
    keys = Tokens(_rows(columns.tokens.documents, rows_A, -1), _rows(columns.tokens.positions, rows_A, 0))
    return _rows(k, rows_A, 0), _rows(v, rows_A, 0), keys


def _blocks(length: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, length)) for i in range(0, length, block)]


def _visible(columns: _Columns, here: slice, keys: Tokens, others_A: jax.Array) -> jax.Array:
    queries = Tokens(columns.queries.documents[:, here], columns.queries.positions[:, here])
    return attention.visible(queries, keys, others_A)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, columns, block):
    """q [A, G, R, T, H], k and v [B, G, T, H] → out [A, G, R, T, H], lse [A, G, R, T]."""
    parts = _blocks(q.shape[3], block)

    def step(running, column):
        k_AGSH, v_AGSH, keys = _column(k, v, columns, column[0])

        def update(state, here):
            s = attention.logits(q[..., here, :], k_AGSH, _visible(columns, here, keys, column[1]))
            return attention.accumulate(state, s, v_AGSH)

        return [update(state, here) for state, here in zip(running, parts, strict=True)], None

    running = [attention.start(q[..., here, :]) for here in parts]
    running, _ = jax.lax.scan(step, running, (columns.keys_CA, columns.others_CA))
    outs, lses = zip(*map(attention.finish, running), strict=True)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _attend_forward(q, k, v, columns, block):
    out, lse = checkpoint_name(_attend(q, k, v, columns, block), attention.OUTPUT)
    return (out, lse), (q, k, v, columns, out, lse)


def _attend_backward(block, saved, cotangents):
    q, k, v, columns, out, lse = saved
    dout, dlse = cotangents
    delta = (dout * out).sum(-1) - dlse
    parts = _blocks(q.shape[3], block)

    def step(carry, column):
        dqs, dk, dv = carry
        k_AGSH, v_AGSH, keys = _column(k, v, columns, column[0])
        grads = [
            attention.block_gradients(
                q[..., here, :],
                k_AGSH,
                v_AGSH,
                _visible(columns, here, keys, column[1]),
                lse[..., here],
                delta[..., here],
                dout[..., here, :],
            )
            for here in parts
        ]
        scatter = dict(mode="drop", wrap_negative_indices=False)
        dk = dk.at[column[0]].add(sum(g.k for g in grads), **scatter)
        dv = dv.at[column[0]].add(sum(g.v for g in grads), **scatter)
        return ([dq + g.q for dq, g in zip(dqs, grads, strict=True)], dk, dv), None

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    start = [zeros(q[..., here, :].shape) for here in parts], zeros(k.shape), zeros(v.shape)
    (dqs, dk, dv), _ = jax.lax.scan(step, start, (columns.keys_CA, columns.others_CA))
    dq = jnp.concatenate(dqs, axis=3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
