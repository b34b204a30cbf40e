"""Crossbatch: which contexts each row's memory layers see in training.

FoT, section 3.2. A variant is a static table of rows; `VARIANTS` lists the functions that make one. Rows of a batch
are numbered pack by pack: row `b·K + j` is the j-th of the K consecutive contexts of pack b's document stream.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fot.attention import Tokens
from fot.config import CrossbatchConfig


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
