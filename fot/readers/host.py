"""Attention to a memory in the host's RAM or in a file, searched there by FAISS: for more entries than devices hold."""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot.attention import Partial
from fot.errors import UserError
from fot.memory import Memory
from fot.readers.reader import Reader

# Entries by number, while a `HostMemory` holds them: a program is compiled for all of them and told which one to read.
_HELD: weakref.WeakValueDictionary[int, "_Held"] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


Place = tuple[int, int, int]  # memory layer, row, key/value head


class _Held:
    """Numpy arrays of a memory, and what `fot.readers.host_lists` keeps of its heads."""

    def __init__(self, arrays: Memory):
        self.arrays = arrays
        self.lists: dict[Place, Any] = {}


@jax.tree_util.register_pytree_node_class
class HostMemory:
    """Entries on the host. To devices it is a number and how much is in it; all of it is of one process.

    What changes it changes it in place and gives it up, as with a memory that is donated.

    Attributes:
      number: that it is held by, int32.
      written, length: [B] int32, see `fot.memory.Memory`.
    """

    def __init__(self, held: _Held | None, number: Any, written: Any, length: Any):
        self._held, self.number, self.written, self.length = held, number, written, length

    @classmethod
    def of(cls, held: _Held, number: Any) -> "HostMemory":
        """Returns the memory as it is now."""
        written = held.arrays.written.copy()
        return cls(held, number, written, np.minimum(written, held.arrays.capacity))

    def tree_flatten(self) -> tuple[tuple[Any, Any, Any], None]:
        """Returns what crosses to devices."""
        return (self.number, self.written, self.length), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, Any, Any]) -> "HostMemory":
        """Returns what a device sees."""
        return cls(None, *children)

    @property
    def arrays(self) -> Memory:
        """The numpy arrays, outside of compiled programs."""
        return self._held.arrays

    @property
    def lists(self) -> dict[Place, Any]:
        """Inverted files of heads, outside of compiled programs; empty if nothing made them."""
        return self._held.lists

    @property
    def capacity(self) -> int:
        """Slots of a row, M, outside of compiled programs."""
        return self.arrays.capacity

    def slots(self, layer: int) -> "HostSlots":
        """Returns the view of the layer-th memory layer."""
        return HostSlots(self.number, self.written, jnp.int32(layer))


class HostSlots(NamedTuple):
    """One layer's view: the number of the memory, [B] entries written, the number of the layer."""

    number: jax.Array
    written: jax.Array
    layer: jax.Array


class Head(NamedTuple):
    """The filled slots of one layer, row and head.

    Attributes:
      keys, values: [M, H].
      written: entries that the row has taken since it was cleared; entry n is in slot n % M.
      lists: its inverted file; None without.
    """

    keys: np.ndarray
    values: np.ndarray
    written: int
    lists: Any


# (queries [Q, H], head, slots that they see (None is all), reader) -> logits and slots [Q, K].
Search = Callable[[np.ndarray, Head, np.ndarray | None, Reader], tuple[np.ndarray, np.ndarray]]


def host(q_BTNH: jax.Array, documents_BT: jax.Array, slots: HostSlots, reader: Reader) -> Partial:
    """Attention to the k visible slots of largest inner product, as `knn`, found on the host by FAISS."""
    return attend(q_BTNH, documents_BT, slots, reader, nearest)


def attend(q_BTNH: jax.Array, documents_BT: jax.Array, slots: HostSlots, reader: Reader, search: Search) -> Partial:
    """Attention to the slots that `search` finds on the host.

    Only queries and what is attended to cross between device and host. There is no gradient.
    """
    shape = Partial(
        jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32), jax.ShapeDtypeStruct(q_BTNH.shape[:3], jnp.float32)
    )
    return jax.pure_callback(
        functools.partial(_attend, reader=reader, search=search), shape, q_BTNH, documents_BT, slots
    )


def hold(arrays: Memory) -> HostMemory:
    """Returns a memory of numpy arrays, which are not copied; those of `fot.memory_file.load` stay in their files.

    Raises:
      UserError: FAISS is not installed.
    """
    _faiss()
    held, number = _Held(arrays), next(_NUMBERS)
    _HELD[number] = held
    return HostMemory.of(held, np.int32(number))


def empty(layers: int, rows: int, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> HostMemory:
    """Returns a memory without entries in RAM, see `fot.memory.empty`; RAM is taken as it fills.

    Raises:
      UserError: FAISS is not installed.
    """
    shape = (layers, rows, kv_heads, capacity, head_dim)
    return hold(
        Memory(
            keys=np.zeros(shape, dtype),
            values=np.zeros(shape, dtype),
            documents=np.full((rows, capacity), -1, np.int32),
            written=np.zeros(rows, np.int32),
        )
    )


def clear(memory: HostMemory, rows_B: Any) -> HostMemory:
    """Empties rows, see `fot.memory.clear`."""
    rows_B = np.asarray(rows_B)
    for place in [place for place in memory.lists if rows_B[place[1]]]:
        del memory.lists[place]
    memory.arrays.documents[rows_B] = -1
    memory.arrays.written[rows_B] = 0
    return HostMemory.of(memory._held, memory.number)


def write(memory: HostMemory, keys: Any, values: Any, documents_BT: Any) -> HostMemory:
    """Appends a window's entries, see `fot.memory.write`; waits for the devices."""
    arrays, documents_BT = memory.arrays, np.asarray(documents_BT)
    keys, values = np.asarray(keys), np.asarray(values)
    for row, documents_T in enumerate(documents_BT):
        token = np.flatnonzero(documents_T >= 0)
        count, token = len(token), token[max(len(token) - arrays.capacity, 0) :]
        slot = (arrays.written[row] + np.arange(count - len(token), count)) % max(arrays.capacity, 1)
        for held, new in ((arrays.keys, keys), (arrays.values, values)):
            held[:, row, :, slot] = new[:, row, token].swapaxes(0, 1).astype(held.dtype)
        arrays.documents[row, slot] = documents_T[token]
        arrays.written[row] += count
    return HostMemory.of(memory._held, memory.number)


def heads(memory: HostMemory) -> Iterator[tuple[Place, Head]]:
    """Yields every layer's, row's and head's filled slots."""
    layers, rows, count = memory.arrays.keys.shape[:3]
    for place in itertools.product(range(layers), range(rows), range(count)):
        yield place, _head(memory._held, place)


def _head(held: _Held, place: Place) -> Head:
    written = int(held.arrays.written[place[1]])
    filled = min(written, held.arrays.capacity)
    keys, values = (x[place][:filled] for x in (held.arrays.keys, held.arrays.values))
    return Head(keys, values, written, held.lists.get(place))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("readers 'host' and 'host_lists' need FAISS: pip install 'fot[faiss]'") from None
    return faiss


def _attend(q_BTNH: Any, documents_BT: Any, slots: HostSlots, *, reader: Reader, search: Search) -> Partial:
    q_BTNH, documents_BT = np.asarray(q_BTNH, np.float32), np.asarray(documents_BT)
    B, T, N, H = q_BTNH.shape
    held, layer = _HELD[int(slots.number)], int(slots.layer)
    arrays = held.arrays
    G = arrays.keys.shape[2]
    out = np.zeros((B, T, G, N // G, H), np.float32)
    lse = np.full((B, T, G, N // G), -np.inf, np.float32)
    q = q_BTNH.reshape(out.shape)
    for row in range(B):
        filled = min(int(arrays.written[row]), arrays.capacity)
        for times, visible in _visible(documents_BT[row], arrays.documents[row, :filled], reader):
            for number in range(G):
                head = _head(held, (layer, row, number))
                for some in np.split(times, range(reader.block, len(times), reader.block)):
                    queries = np.ascontiguousarray(q[row, some, number].reshape(-1, H))
                    s, index = search(queries, head, visible, reader)
                    found = _softmax(s, head.values[index])
                    out[row, some, number] = found[0].reshape(len(some), -1, H)
                    lse[row, some, number] = found[1].reshape(len(some), -1)
    return Partial(out.reshape(q_BTNH.shape), lse.reshape(B, T, N))


def _visible(
    documents_T: np.ndarray, documents_M: np.ndarray, reader: Reader
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields (times, slots that queries of these times see, None being all), where there are any."""
    groups = [(np.arange(len(documents_T)), documents_M >= 0)]
    if not reader.multi_doc:
        own = [each for each in np.unique(documents_T) if each >= 0]
        groups = [(np.flatnonzero(documents_T == each), documents_M == each) for each in own]
    for times, seen_M in groups:
        if seen_M.all() and len(seen_M):
            yield times, None
        elif seen_M.any():
            yield times, np.flatnonzero(seen_M)


def nearest(
    queries: np.ndarray, head: Head, visible: np.ndarray | None, reader: Reader
) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and slots [Q, K] of the nearest visible keys, exact."""
    faiss, keys = _faiss(), head.keys
    count = len(keys) if visible is None else len(visible)

    def search(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        some = keys[begin:end] if visible is None else keys[visible[begin:end]]
        k = min(reader.neighbours, end - begin)
        s, index = faiss.knn(queries, np.ascontiguousarray(some, np.float32), k, metric=faiss.METRIC_INNER_PRODUCT)
        return s, index + begin

    # FAISS reads float32 where it lies; what has to be converted or picked is, block by block.
    as_is = visible is None and keys.dtype == np.float32
    size = count if as_is else max(reader.block, reader.neighbours)
    found = search(0, min(size, count))
    for begin in range(size, count, size):
        found = best([found, search(begin, min(begin + size, count))], reader.neighbours)
    s, index = found
    return s, index if visible is None else visible[index]


def best(found: list[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins logits and slots [Q, K] of several searches: the `count` of largest logit, of equal ones the first."""
    s, index = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
    order = np.argsort(-s, 1, kind="stable")[:, :count]
    return np.take_along_axis(s, order, 1), np.take_along_axis(index, order, 1)


def _softmax(s: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns values [Q, K, H] averaged under the softmax of logits [Q, K], and the log-sum-exp; zeros of nothing."""
    top = s.max(1, keepdims=True)
    top = np.where(top == -np.inf, 0.0, top)
    p = np.exp(s - top)
    total = p.sum(1)
    out = np.einsum("qk,qkh->qh", p, values.astype(np.float32), optimize=True)
    with np.errstate(divide="ignore"):
        return out / np.where(total > 0, total, 1.0)[:, None], top[:, 0] + np.log(total)
