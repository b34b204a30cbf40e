"""Crossbatch attention by the kernels of `fot.kernels`: when they can run, and what each device does."""

import functools
import logging

import jax
import numpy as np
from jax.sharding import PartitionSpec

from fot import crossbatch, sharding
from fot.attention import Tokens
from fot.config import ModelConfig
from fot.crossbatch import Table
from fot.kernels import crossbatch as kernels
from fot.kernels.crossbatch import Joint
from fot.kernels.passes import Keys
from fot.memory import Memory
from fot.sharding import ROWS

BLOCK = 512  # tokens of a row that a kernel has at once; its logits of 512 × 512 fit into every generation's VMEM
_TOO_OLD = ("TPU v2", "TPU v3")  # Mosaic has no bfloat16 products for them

_log = logging.getLogger(__name__)


def runs(config: ModelConfig, table: Table | None, memory: Memory | None) -> bool:
    """Tells whether the kernels compute a memory layer's attention: one softmax over the row and its contexts.

    Where the devices are TPUs that can't, that is logged once.

    Args:
      config: its `attention_kernel` "jnp" says never; "auto" on TPUs; "pallas" also elsewhere, interpreted.
      table: of the rows' contexts, if there is one.
      memory: what else the layer reads.
    """
    choice = config.attention_kernel
    if choice == "jnp" or config.memory_gate or table is None or table.contexts_BC.shape[1] == 0 or memory is not None:
        return False
    platform, kind = _device()
    if kind.startswith(_TOO_OLD):
        _tell(kind)
        return False
    return choice == "pallas" or platform == "tpu"


@functools.cache
def _tell(kind: str) -> None:
    _log.warning("%s runs no attention kernels: crossbatch attention takes its jnp form (model.attention_kernel)", kind)


def _device() -> tuple[str, str]:
    """Returns platform and kind of the devices; of those to compile for, which need not be there."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind


@jax.named_scope("contexts")
def attend(q_ATNH: jax.Array, near: Keys, far: Keys, queries: Tokens, tokens: Tokens, table: Table) -> Joint:
    """`fot.kernels.crossbatch.attend`, each device having the rows and heads that it holds.

    Contexts that are rows of other devices are brought in before, as in `crossbatch.attend_contexts`.

    Args:
      q_ATNH: queries, already scaled, of any A rows.
      near: their local keys and values [A, T, G, H].
      far: keys and values [B, T, G, H] of all rows, as other rows see them.
      queries: [A, T], tokens of the queries.
      tokens: [B, T], tokens of all rows.
      table: static; its rows are those of the queries.
    """
    shards, rows, T = sharding.row_shards(), len(far.keys), q_ATNH.shape[1]
    split = ROWS if len(q_ATNH) % shards == 0 and rows % shards == 0 else None
    shards = shards if split else 1
    own = crossbatch.of_shards(table, rows, shards)
    each = rows if own is None else rows // shards
    plan = kernels.plan(*(table if own is None else own), rows=each, length=T, block=BLOCK, shards=shards)

    def here(q, near, far, queries, tokens, plan):
        if own is None:
            far, tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, ROWS, tiled=True), (far, tokens))
        return kernels.attend(q, near, far, queries, tokens, plan, BLOCK, _device()[0] != "tpu")

    axis, heads = PartitionSpec(split), PartitionSpec(split, None, sharding.MESH_AXES["heads"])
    spread = sharding.over_devices(
        here, in_specs=(heads, heads, heads, axis, axis, axis), out_specs=heads, axes=sharding.AXES
    )
    return spread(q_ATNH, near, far, queries, tokens, jax.tree.map(np.asarray, plan))
