"""The formula against hand counts, against 6·N per token, and its behaviour in each argument."""

import dataclasses

import pytest

from fot.config import ModelConfig
from fot.flops import forward_flops, train_flops

# W = 2·D·H·(N + G) + 2·D·F = 2·4·2·(2 + 1) + 2·4·8 = 48 + 64 = 112
TINY = ModelConfig(
    vocab_size=10, layers=2, dim=4, heads=2, kv_heads=1, head_dim=2, mlp_dim=8, mlp="gelu", memory_layers=(0,)
)
ALL = {"rows": 3, "loss_rows": 3, "context": 5, "context_pairs": 0, "memory": 0}


def test_hand_counted_tiny_model():
    tokens, pairs = 15, 3 * 15  # 3 rows of 5 tokens; 1 + 2 + 3 + 4 + 5 = 15 causal pairs a row
    matrices = 2 * tokens * (2 * 112 + 4 * 10)
    attention = 2 * pairs * (4 * 2 * 2)
    assert forward_flops(TINY, **ALL) == matrices + attention


def test_each_context_pair_and_memory_entry_counts_in_memory_layers_alone():
    plain = forward_flops(TINY, **ALL)
    assert forward_flops(TINY, **ALL | {"context_pairs": 7}) - plain == 7 * 25 * 16
    assert forward_flops(TINY, **ALL | {"memory": 100}) - plain == 15 * 100 * 16
    none = dataclasses.replace(TINY, memory_layers=())
    assert forward_flops(none, **ALL | {"context_pairs": 7, "memory": 100}) == plain


def test_rows_without_loss_count_up_to_the_last_memory_layer():
    less = forward_flops(TINY, **ALL | {"loss_rows": 1})
    per_row_layer = 2 * 5 * 112 + 15 * 16
    assert forward_flops(TINY, **ALL) - less == 2 * per_row_layer + 2 * (2 * 5 * 4 * 10)
    last = dataclasses.replace(TINY, memory_layers=(0, 1))
    head = 2 * (2 * 5 * 4 * 10)
    assert forward_flops(last, **ALL) - forward_flops(last, **ALL | {"loss_rows": 1}) == head


def test_swiglu_has_three_matrices():
    swiglu = dataclasses.replace(TINY, mlp="swiglu")
    assert forward_flops(swiglu, **ALL) - forward_flops(TINY, **ALL) == 2 * 15 * 2 * 4 * 8


def test_training_is_three_times_forward():
    sizes = {"rows": 4, "loss_rows": 2, "context": 8, "context_pairs": 6}
    assert train_flops(TINY, **sizes) == 3 * forward_flops(TINY, **sizes, memory=0)


def test_large_model_is_about_six_flops_a_parameter_and_token():
    llama_7b = ModelConfig(
        vocab_size=32000,
        layers=32,
        dim=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp_dim=11008,
        mlp="swiglu",
        memory_layers=(8, 16, 24),
        memory_positions="zero",
        qk_norm=False,
        tied_embeddings=False,
    )
    parameters, tokens = 6.738e9, 16 * 2048
    flops = train_flops(llama_7b, rows=16, loss_rows=16, context=2048, context_pairs=0)
    assert flops == pytest.approx(6 * parameters * tokens, rel=0.05)
