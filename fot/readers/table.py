"""All readers by name."""

from collections.abc import Callable

import jax

from fot.attention import Partial
from fot.memory import Slots
from fot.readers.approximate import approximate
from fot.readers.clustered import clustered
from fot.readers.dense import dense
from fot.readers.host import host
from fot.readers.host_lists import host_lists
from fot.readers.knn import knn
from fot.readers.reader import Reader
from fot.readers.sharded import sharded_dense, sharded_knn

READERS: dict[str, Callable[[jax.Array, jax.Array, Slots, Reader], Partial]] = {
    "dense": dense,
    "knn": knn,
    "approximate": approximate,
    "clustered": clustered,
    "host": host,
    "host_lists": host_lists,
    "sharded_dense": sharded_dense,
    "sharded_knn": sharded_knn,
}

# Where the entries lie that a reader reads, an entry of `fot.loading.STORES`; "device" if it isn't named here.
PLACES = {
    "clustered": "lists",
    "host": "host",
    "host_lists": "host_lists",
    "sharded_dense": "sharded",
    "sharded_knn": "sharded",
}


def place(name: str) -> str:
    """Returns where the entries lie that the reader of that name reads."""
    return PLACES.get(name, "device")


@jax.named_scope("memory")
def read(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attends to a memory with the reader of that name.

    Args:
      q_BTNH: queries, already scaled.
      documents_BT: int32, documents of the queries' tokens.
      slots: one layer's view of the memory.
      reader: how to read.

    Returns:
      Partial attention over what is visible; lse is -inf where nothing is.
    """
    return READERS[reader.name](q_BTNH, documents_BT, slots, reader)
