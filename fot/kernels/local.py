"""Causal attention of rows to themselves by JAX's kernels for TPUs, splash attention.

The reference, of the same signature but for the dtype of its output, is `fot.attention.attend_local`.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from fot import attention
from fot.attention import Tokens
from fot.kernels.blocks import blocks_of, heads_first

_LANES = 128


def attend(q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, tokens: Tokens, block: int, interpret) -> jax.Array:
    """Attention of one device's rows, each to itself, causal and within documents.

    Args:
      q_BTNH: queries, already scaled.
      k_BTGH: keys; G divides N.
      v_BTGH: values.
      tokens: [B, T], in the order of the row; a document's lie together, in their order.
      block: at most so many tokens of a row are dealt with at once; a multiple of 128.
      interpret: run without a TPU; or how.

    Returns:
      [B, T, N, H], of the queries' dtype; anything finite for what is no token.
    """
    T, N = q_BTNH.shape[1:3]
    length, count = blocks_of(-(-T // _LANES) * _LANES, block)
    pad = length * count - T

    documents_BT = jnp.pad(tokens.documents, ((0, 0), (0, pad)), constant_values=-1)
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((T + pad, T + pad))] * N),
        block_sizes=BlockSizes(*[length] * 8),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=attention.OUTPUT,
        interpret=interpret,
    )
    q, k, v = (heads_first(x, pad) for x in (q_BTNH, k_BTGH, v_BTGH))
    out = jax.vmap(kernel)(q, k, v, SegmentIds(documents_BT, documents_BT))
    return out.swapaxes(1, 2)[:, :T]
