"""Crossbatch attention by the kernels of `fot.kernels`: when they can run, and what each device does."""

import jax
import numpy as np

from fot import device, ring, sharding
from fot.attention import Tokens
from fot.config import ModelConfig
from fot.crossbatch import Table
from fot.kernels import crossbatch as kernels
from fot.kernels.crossbatch import Joint
from fot.kernels.passes import Keys
from fot.memory import Memory

BLOCK = 512  # tokens of a row that a kernel has at once; its logits of 512 × 512 fit into every generation's VMEM


def runs(config: ModelConfig, table: Table | None, memory: Memory | None) -> bool:
    """Tells whether the kernels compute a memory layer's attention: one softmax over the row and its contexts.

    Args:
      config: of the model.
      table: of the rows' contexts, if there is one.
      memory: what else the layer reads.
    """
    if config.memory_gate or table is None or table.contexts_BC.shape[1] == 0 or memory is not None:
        return False
    return device.runs_kernels(config.attention_kernel)


@jax.named_scope("contexts")
def attend(
    q_ATNH: jax.Array,
    near: Keys,
    far: Keys,
    queries: Tokens,
    tokens: Tokens,
    table: Table,
    exchange: str = ModelConfig.attention_exchange,
) -> Joint:
    """`fot.kernels.crossbatch.attend`, each device having the rows and heads that it holds.

    Args:
      q_ATNH: queries, already scaled, of any A rows.
      near: their local keys and values [A, T, G, H].
      far: keys and values [B, T, G, H] of all rows, as other rows see them.
      queries: [A, T], tokens of the queries.
      tokens: [B, T], tokens of all rows.
      table: static; its rows are those of the queries.
      exchange: how contexts of other devices come, as in `contexts.attend_contexts`.
    """
    route, T = ring.route(table, len(far.keys), exchange), q_ATNH.shape[1]
    plans = tuple(
        kernels.plan(*seen, route.rows, T, BLOCK, route.trip.shards, local=stop == 0)
        for stop, seen in enumerate(route.tables)
    )

    def here(with_heads, of_rows):
        q, near, far = with_heads
        queries, tokens, plans = of_rows
        far, tokens = route.bring((far, tokens))
        return kernels.attend_around(q, near, far, queries, tokens, plans, route.trip, BLOCK, device.interprets())

    return route.over_devices(
        here, (q_ATNH, near, far), (queries, tokens, jax.tree.map(np.asarray, plans)), sharding.AXES
    )
