"""The order in which the kernels of crossbatch attention visit blocks of tokens: static lists, made of a row table.

A row of T tokens is cut into blocks; the block numbered `row · blocks + i` is the i-th of its row. A kernel's grid runs
down such a list, and its index maps read from it which blocks to bring in: so a row that sees few contexts costs
few steps, and no context is gathered or scattered. One list goes query block by query block (forward, and the
gradient of queries); two go key block by key block, each with the query blocks that read it (gradients of keys and
values): the table turned inside out.
"""

from typing import NamedTuple

import numpy as np

# Flags of a step: what its keys are to its queries, in the lowest bits, and what else happens there.
NOTHING, NEAR, POSITIVE, NEGATIVE = range(4)
KIND = 3
FIRST, LAST, JOINT = 4, 8, 16  # of the block that stays; JOINT is the last step of the local context


class ByQuery(NamedTuple):
    """Steps that stay with a block of queries while blocks of keys pass by: first the local context, then the others.

    Attributes:
      queries: [S] int32, block of queries.
      near: [S] int32, block of local keys; where the step has none, the one that is there already.
      far: [S] int32, block of keys of contexts, likewise.
      flags: [S] int32.
    """

    queries: np.ndarray
    near: np.ndarray
    far: np.ndarray
    flags: np.ndarray


class ByKey(NamedTuple):
    """Steps that stay with a block of keys while the blocks of queries that read it pass by.

    Attributes:
      keys: [S] int32, block of keys.
      queries: [S] int32, block of queries; where nothing reads the keys, the one that is there already.
      flags: [S] int32.
    """

    keys: np.ndarray
    queries: np.ndarray
    flags: np.ndarray


class Plan(NamedTuple):
    """Which contexts each row sees, and in which order the kernels go through them.

    Attributes:
      contexts_AC: [A, C] int32, row whose whole context the row sees in this column; -1 is none.
      negative_AC: [A, C] bool, whether tokens of other documents are visible in this column.
      queries: for the forward pass and the gradient of queries.
      near: for the gradients of local keys and values.
      far: for those of contexts.
    """

    contexts_AC: np.ndarray
    negative_AC: np.ndarray
    queries: ByQuery
    near: ByKey
    far: ByKey


def make_plan(
    contexts_AC: np.ndarray, negative_AC: np.ndarray, rows: int, blocks: int, shards: int = 1, local: bool = True
) -> Plan:
    """Returns the plan of a row table.

    Args:
      contexts_AC: as in `Plan`; with several shards, numbered within the shard of the query.
      negative_AC: as in `Plan`.
      rows: that the contexts are of, on each shard.
      blocks: in a row.
      shards: over which the A rows are split evenly. Each has its own lists, padded to the same length, one after the
        other: the leading axis of everything in the plan is then to be split over them.
      local: whether rows see their local context, too.
    """
    tables = zip(np.split(contexts_AC, shards), np.split(negative_AC, shards), strict=True)
    plans = [_of_shard(contexts, negative, rows, blocks, local) for contexts, negative in tables]
    queries, near, far = (_joined([plan[kind] for plan in plans]) for kind in (0, 1, 2))
    return Plan(contexts_AC, negative_AC, ByQuery(*queries), ByKey(*near), ByKey(*far))


def _of_shard(contexts_AC: np.ndarray, negative_AC: np.ndarray, rows: int, blocks: int, local: bool):
    """Returns the lists of one shard: by query, by local key, by key of a context."""
    A = len(contexts_AC)
    row_L, here_L, past_L = (x.ravel() for x in np.broadcast_arrays(*np.ogrid[:A, :blocks, :blocks]))
    local_L = (past_L <= here_L) & local
    near = row_L * blocks + here_L, row_L * blocks + past_L, np.full(row_L.shape, NEAR)
    near = tuple(x[local_L] for x in near)
    row_S, column_S = np.nonzero(contexts_AC >= 0)
    i, j = (x.ravel() for x in np.indices((blocks, blocks)))
    far = (
        (row_S[:, None] * blocks + i).ravel(),
        (contexts_AC[row_S, column_S][:, None] * blocks + j).ravel(),
        np.where(negative_AC[row_S, column_S], NEGATIVE, POSITIVE).repeat(blocks * blocks),
    )
    return _by_query(near, far, A * blocks), _by_key(*near, A * blocks), _by_key(*far, rows * blocks)


def _by_query(near: tuple[np.ndarray, ...], far: tuple[np.ndarray, ...], count: int) -> ByQuery:
    """Returns the steps of all `count` blocks of queries; one that sees nothing has a step that does nothing."""
    queries, keys, kinds = (np.concatenate(pair) for pair in zip(near, far, strict=True))
    blind = np.setdiff1d(np.arange(count), queries)
    queries, keys, kinds = _sorted(0, (queries, keys, kinds), (blind, 0 * blind, 0 * blind + NOTHING))
    first, last = _ends(queries)
    joint = (kinds == NEAR) & (last | (np.append(kinds[1:], NOTHING) != NEAR))
    flags = kinds + FIRST * first + LAST * last + JOINT * joint
    return ByQuery(*_int32(queries, _held(keys, kinds == NEAR), _held(keys, kinds > NEAR), flags))


def _by_key(queries: np.ndarray, keys: np.ndarray, kinds: np.ndarray, count: int) -> ByKey:
    """Returns the steps of all `count` blocks of keys; one that nothing reads has a step that does nothing."""
    unread = np.setdiff1d(np.arange(count), keys)
    queries, keys, kinds = _sorted(1, (queries, keys, kinds), (0 * unread, unread, 0 * unread + NOTHING))
    first, last = _ends(keys)
    return ByKey(*_int32(keys, _held(queries, kinds != NOTHING), kinds + FIRST * first + LAST * last))


def _sorted(by: int, *lists: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Joins lists of steps and sorts them by one of their arrays."""
    joined = [np.concatenate(arrays) for arrays in zip(*lists, strict=True)]
    order = np.argsort(joined[by], kind="stable")
    return [array[order] for array in joined]


def _ends(stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where a run of equal numbers begins, and where it ends."""
    changes = stays[1:] != stays[:-1]
    return np.append(True, changes), np.append(changes, True)


def _held(blocks: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """Returns the blocks where they are needed, else the last one before that was: the same block isn't fetched twice.

    Before the first that is needed it is that one; 0 if none is.
    """
    places = np.maximum.accumulate(np.where(needed, np.arange(len(blocks)), -1))
    return blocks[np.where(places < 0, needed.argmax(), places)] if needed.any() else np.zeros_like(blocks)


def _int32(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array.astype(np.int32) for array in arrays)


def _joined(lists: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Concatenates the lists of shards, padded with steps that stay where the last one was and do nothing."""
    length = max(len(steps[-1]) for steps in lists)

    def padded(array: np.ndarray, mode: str) -> np.ndarray:
        return np.pad(array, (0, length - len(array)), mode=mode)

    *places, flags = zip(*lists, strict=True)
    return [np.concatenate([padded(each, "edge") for each in place]) for place in places] + [
        np.concatenate([padded(each, "constant") for each in flags])
    ]
