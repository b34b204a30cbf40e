"""Floating point operations of the model: THE formula, for MFU and for budgets.

A product of [m, k] and [k, n] is 2·m·k·n. With N heads, G kv heads of H dims, D model, F mlp, V vocabulary, R rows of
T tokens, P rows among them that count in the loss, A = index of the last memory layer + 1 (0 without one):

  forward = 2 · R·T · A · W  +  2 · P·T · (L - A) · W  +  2 · P·T · D·V             matrices, of which
              W = 2·D·N·H + 2·D·G·H + (3 if swiglu else 2)·D·F a layer              (query, output; key, value; mlp)
          + 4·N·H · (A·R + (L - A)·P) · T·(T + 1)/2                                 local attention
          + 4·N·H · |memory layers| · (X·T·T + R·T·M)                               contexts and memory
  train   = 3 · forward                                                             backward is twice the forward

- A query costs 4·N·H per key it sees: 2·N·H for its logit, 2·N·H for the weighted value. Local attention is causal, and
  the half above the diagonal is not counted, whether or not a kernel computes it.
- X is the number of (row, other context) pairs of a memory layer; all T·T logits of such a pair count. M is the number
  of memory entries that each query scores (inference). Keys hidden by document boundaries count like others.
- Rows without loss are needed as contexts up to the last memory layer only, and count up to there.
- The embedding lookup, norms, RoPE, softmax, gates and what remat computes again count 0.
"""

from fot.config import ModelConfig


def forward_flops(
    model: ModelConfig, *, rows: int, loss_rows: int, context: int, context_pairs: int, memory: int
) -> int:
    """Returns the floating point operations of one forward pass over a batch.

    Args:
      model: sizes.
      rows: rows of the batch.
      loss_rows: rows that are needed after the last memory layer, `rows` if all are.
      context: tokens of a row.
      context_pairs: (row, other context) pairs in each memory layer; a row's own local context isn't one.
      memory: memory entries that each query of a memory layer scores; 0 in training.
    """
    layers_before = model.memory_layers[-1] + 1 if model.memory_layers else 0
    row_layers = layers_before * rows + (model.layers - layers_before) * loss_rows
    matrices = 2 * context * (row_layers * _layer_weights(model) + loss_rows * model.dim * model.vocab_size)
    local_pairs = row_layers * context * (context + 1) // 2
    memory_pairs = len(model.memory_layers) * (context_pairs * context**2 + rows * context * memory)
    return matrices + 4 * model.heads * model.head_dim * (local_pairs + memory_pairs)


def train_flops(model: ModelConfig, *, rows: int, loss_rows: int, context: int, context_pairs: int) -> int:
    """Returns the floating point operations of one training step on a batch, 3 × forward; see `forward_flops`."""
    return 3 * forward_flops(
        model, rows=rows, loss_rows=loss_rows, context=context, context_pairs=context_pairs, memory=0
    )


def _layer_weights(model: ModelConfig) -> int:
    """Returns the entries of one layer's matrices, W."""
    attention = 2 * model.dim * model.head_dim * (model.heads + model.kv_heads)
    return attention + model.dim * model.mlp_dim * {"swiglu": 3, "gelu": 2}[model.mlp]
