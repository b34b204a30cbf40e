"""How a memory is read: a run's settings, and the blocks of slots that all readers stream."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Tokens
from fot.config import ExperimentConfig
from fot.memory import Slots


class Reader(NamedTuple):
    """How a memory is read: plain numbers and a name, fixed for a run.

    Attributes:
      name: an entry of `fot.readers.table.READERS`.
      neighbours: entries retrieved per query and head, k; for top-k readers.
      block: slots scored at once; bounds memory, changes no result.
      multi_doc: whether a query sees entries of other documents than its own.
      recall_target: share of the k nearest that "approximate" finds, expected.
      list_size: slots of the lists of "clustered" at the most; of "host_lists", their mean.
      probes: lists that "clustered" and "host_lists" read per query and head.
      attention_kernel: as `model.attention_kernel`; whether "dense" and "sharded_dense" read by a kernel.
    """

    name: str
    neighbours: int
    block: int
    multi_doc: bool
    recall_target: float
    list_size: int
    probes: int
    attention_kernel: str = "auto"


def of_config(name: str, config: ExperimentConfig) -> Reader:
    """Returns the reader of that name as an evaluation wants it: it sees all that its memory holds.

    A memory of one document holds nothing else, so what is visible needs no mask.
    """
    evaluate = config.evaluate
    return Reader(
        name=name,
        neighbours=evaluate.neighbours,
        block=evaluate.block,
        multi_doc=True,
        recall_target=evaluate.recall_target,
        list_size=evaluate.list_size,
        probes=evaluate.probes,
        attention_kernel=config.model.attention_kernel,
    )


class Block(NamedTuple):
    """A block of slots: keys and values [B, G, S, H], documents [B, S]; `start` is its first slot."""

    keys: jax.Array
    values: jax.Array
    documents: jax.Array
    start: jax.Array


def fold(step: Callable[[Any, Block], Any], carry: Any, slots: Slots, block: int) -> Any:
    """Folds `step` over the blocks of the slots that are not empty in all rows; so an unfilled memory costs little.

    Blocks are cut out one by one, so the memory is never copied. The last one ends with the last slot; what it
    shares with the one before is empty in it.
    """
    M = slots.documents.shape[1]
    if M == 0:
        return carry
    size = min(block, M)

    def visit(carry, first):
        start = jnp.minimum(first, M - size)

        def cut(x, axis):
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

        documents = jnp.where(start + jnp.arange(size) >= first, cut(slots.documents, 1), -1)

        def take(carry):
            return step(carry, Block(cut(slots.keys, 2), cut(slots.values, 2), documents, start))

        return jax.lax.cond((documents >= 0).any(), take, lambda carry: carry, carry), None

    return jax.lax.scan(visit, carry, jnp.arange(0, M, size))[0]


def visible(documents_BT: jax.Array, block: Block, reader: Reader) -> jax.Array:
    """Which slots each query may see: what a memory holds was read before any of its queries."""
    queries = Tokens(documents_BT, jnp.zeros_like(documents_BT))
    keys = Tokens(block.documents, jnp.zeros_like(block.documents))
    return attention.visible(queries, keys, jnp.full(documents_BT.shape[0], reader.multi_doc))
