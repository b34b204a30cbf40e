"""Attention to the nearest slots of a memory, approximately: the largest of each bin, and the best k of those.

The algorithm of `jax.lax.approx_max_k` (TPU-KNN, arXiv 2206.14286): slots are dealt to L bins, and of each bin only
the largest logit is kept. One of the k largest is lost where it shares its bin with a larger one. With slots in no
order of their logits the j-th largest is found with probability (1 - 1/L)^(j-1), hence each with (1 - 1/L)^(k-1) at
least, and L = (1 - k) / log(recall) bins suffice; XLA makes bins of a power of two of slots, and no fewer bins than a
TPU has lanes.
"""

import math

import jax
import jax.numpy as jnp

from fot import attention
from fot.attention import Partial
from fot.memory import Slots
from fot.readers import chosen, knn
from fot.readers.chosen import Chosen
from fot.readers.reader import Reader

_LANES = 128


def approximate(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to about the k visible slots of largest inner product; `reader.recall_target` of them, expected."""
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    return chosen.attend(q, slots, nearest(q, documents_BT, slots, reader))


def nearest(q_BGRTH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Chosen:
    """Returns k visible slots, the largest of what was found first; without gradient."""
    M = slots.documents.shape[1]
    width = bin_width(M, min(reader.neighbours, M), reader.recall_target)
    if width == 1:
        return knn.nearest(q_BGRTH, documents_BT, slots, reader)

    def on_tpu(q, documents_BT, slots):
        return by_instruction(q, documents_BT, slots, reader, width)

    def elsewhere(q, documents_BT, slots):
        return by_bins(q, documents_BT, slots, reader, width)

    q, slots = jax.lax.stop_gradient((q_BGRTH, slots))
    return jax.lax.platform_dependent(q, documents_BT, slots, tpu=on_tpu, default=elsewhere)


def bin_width(slots: int, count: int, recall_target: float) -> int:
    """Returns the slots of a bin, as XLA chooses it for the `count` largest of `slots`."""
    bins = max(int((1 - count) / math.log(recall_target)), _LANES)
    return 1 if slots <= bins else 2 ** int(math.log2(slots // bins))


def by_instruction(q_BGRTH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader, width: int) -> Chosen:
    """By the instruction of the TPU; elsewhere XLA sorts instead."""
    M = slots.documents.shape[1]
    count = min(reader.neighbours, M)
    # Whole bins for each lane; or else XLA would make narrower ones.
    size = min(M, -(-reader.block // (_LANES * width)) * _LANES * width)

    def visit(first):
        block = chosen.cut(slots, first, size)
        s = jnp.moveaxis(chosen.scores(q_BGRTH, documents_BT, slots, block, reader.multi_doc), 2, 4)
        score, place = jax.lax.approx_max_k(
            s, min(count, size), recall_target=reader.recall_target, reduction_input_size_override=M,
            aggregate_to_topk=False,
        )  # fmt: skip
        return Chosen(block.start + place, score)

    found = jax.lax.map(visit, jnp.arange(0, M, size))
    return _best(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 4), found), count)


def by_bins(q_BGRTH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader, width: int) -> Chosen:
    """The same algorithm written out: slot m goes to bin m mod L, L being about M / width."""
    M = slots.documents.shape[1]
    count = min(reader.neighbours, M)
    bins = -(-M // width)
    size = min(reader.block, bins)
    stride = -(-bins // size) * size
    shape = (*q_BGRTH.shape[:2], size, *q_BGRTH.shape[2:4])

    def visit(begin):
        def step(best, first):
            block = chosen.cut(slots, first, size)

            def take(best):
                s = chosen.scores(q_BGRTH, documents_BT, slots, block, reader.multi_doc)
                index = (block.start + jnp.arange(size))[:, None, None]
                return Chosen(jnp.where(s > best.score, index, best.index), jnp.maximum(s, best.score))

            return jax.lax.cond((block.documents >= 0).any(), take, lambda best: best, best), None

        nothing = Chosen(jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf))
        return jax.lax.scan(step, nothing, begin + jnp.arange(0, M, stride))[0]

    found = jax.lax.map(visit, jnp.arange(0, stride, size))
    return _best(jax.tree.map(lambda x: x.transpose(1, 2, 4, 5, 0, 3), found), count)


def _best(found: Chosen, count: int) -> Chosen:
    return chosen.best(jax.tree.map(lambda x: x.reshape(*x.shape[:4], -1), found), count)
