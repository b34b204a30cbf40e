"""Attention of layers that see their row alone: by kernels where they run, else by `fot.attention`."""

import jax
from jax.sharding import PartitionSpec

from fot import attention, device, sharding
from fot.attention import Tokens
from fot.config import ModelConfig
from fot.kernels import local as kernels

BLOCK = 512  # tokens of a row that a kernel has at once


def attend(q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, tokens: Tokens, config: ModelConfig) -> jax.Array:
    """Causal attention of each row to itself, within documents, each device having the rows and heads that it holds.

    Args:
      q_BTNH: queries, already scaled.
      k_BTGH: keys; G divides N.
      v_BTGH: values.
      tokens: [B, T], in the order of the row; a document's lie together, in their order.
      config: of the model.

    Returns:
      [B, T, N, H], float32 or of the queries' dtype; anything finite for what is no token.
    """
    if not device.runs_kernels(config.attention_kernel):
        return attention.attend_local(q_BTNH, k_BTGH, v_BTGH, tokens, config.attention_block).out

    @jax.named_scope("local_attention")
    def here(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens) -> jax.Array:
        return kernels.attend(q, k, v, tokens, BLOCK, device.interprets())

    axes = sharding.rows_of(len(q_BTNH))
    rows, heads = PartitionSpec(axes), PartitionSpec(axes, None, sharding.MESH_AXES["heads"])
    spread = sharding.over_devices(here, (heads, heads, heads, rows), heads, sharding.AXES)
    return spread(q_BTNH, k_BTGH, v_BTGH, tokens)
