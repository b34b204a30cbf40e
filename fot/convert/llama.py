"""One table of parameter names and layouts: ours, Hugging Face's, EasyLM's and GGUF's, in both directions.

An axis is a product of factors, outermost first. The same factors in another order are the same parameter in another
layout, so a transposition, a split into heads and the order of RoPE's pairs are all the same thing: data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fot import model
from fot.config import ModelConfig
from fot.errors import ConversionError

Axes = tuple[tuple[str, ...], ...]


class Place(NamedTuple):
    """Where a parameter is in a format: the tensor's name, with {} for the layer, and its axes."""

    name: str
    axes: Axes


class Parameter(NamedTuple):
    """A parameter's axes with us, without that of layers, and its place in each format; None where it can't be."""

    axes: Axes
    huggingface: Place
    easylm: Place | None
    gguf: Place | None


# RoPE rotates pairs. "pair" says which of a pair, "half" which pair: Hugging Face and we keep all firsts before all
# seconds; EasyLM and llama.cpp (for architecture llama) keep the two of a pair side by side.
_QUERIES, _KEYS, _VALUES = ("heads", "pair", "half"), ("kv_heads", "pair", "half"), ("kv_heads", "pair", "half")
_QUERIES_BY_PAIR, _KEYS_BY_PAIR = ("heads", "half", "pair"), ("kv_heads", "half", "pair")
_HEAD_DIM = ("pair", "half")
_DIM, _MLP, _VOCAB = ("dim",), ("mlp",), ("vocab",)

PARAMETERS: dict[str, Parameter] = {
    "embedding": Parameter(
        (_VOCAB, _DIM),
        Place("model.embed_tokens.weight", (_VOCAB, _DIM)),
        Place("transformer/wte/embedding", (_VOCAB, _DIM)),
        Place("token_embd.weight", (_VOCAB, _DIM)),
    ),
    "layers/attention_norm": Parameter(
        (_DIM,),
        Place("model.layers.{}.input_layernorm.weight", (_DIM,)),
        Place("transformer/h/{}/attention_norm/kernel", (_DIM,)),
        Place("blk.{}.attn_norm.weight", (_DIM,)),
    ),
    "layers/attention/query": Parameter(
        (_DIM, ("heads",), _HEAD_DIM),
        Place("model.layers.{}.self_attn.q_proj.weight", (_QUERIES, _DIM)),
        Place("transformer/h/{}/attention/wq/kernel", (_DIM, _QUERIES_BY_PAIR)),
        Place("blk.{}.attn_q.weight", (_QUERIES_BY_PAIR, _DIM)),
    ),
    "layers/attention/key": Parameter(
        (_DIM, ("kv_heads",), _HEAD_DIM),
        Place("model.layers.{}.self_attn.k_proj.weight", (_KEYS, _DIM)),
        Place("transformer/h/{}/attention/wk/kernel", (_DIM, _KEYS_BY_PAIR)),
        Place("blk.{}.attn_k.weight", (_KEYS_BY_PAIR, _DIM)),
    ),
    "layers/attention/value": Parameter(
        (_DIM, ("kv_heads",), _HEAD_DIM),
        Place("model.layers.{}.self_attn.v_proj.weight", (_VALUES, _DIM)),
        Place("transformer/h/{}/attention/wv/kernel", (_DIM, _VALUES)),
        Place("blk.{}.attn_v.weight", (_VALUES, _DIM)),
    ),
    "layers/attention/query_bias": Parameter(
        (("heads",), _HEAD_DIM), Place("model.layers.{}.self_attn.q_proj.bias", (_QUERIES,)), None, None
    ),
    "layers/attention/key_bias": Parameter(
        (("kv_heads",), _HEAD_DIM), Place("model.layers.{}.self_attn.k_proj.bias", (_KEYS,)), None, None
    ),
    "layers/attention/value_bias": Parameter(
        (("kv_heads",), _HEAD_DIM), Place("model.layers.{}.self_attn.v_proj.bias", (_VALUES,)), None, None
    ),
    "layers/attention/output": Parameter(
        (("heads",), _HEAD_DIM, _DIM),
        Place("model.layers.{}.self_attn.o_proj.weight", (_DIM, _QUERIES)),
        Place("transformer/h/{}/attention/wo/kernel", (_QUERIES, _DIM)),
        Place("blk.{}.attn_output.weight", (_DIM, _QUERIES)),
    ),
    "layers/mlp_norm": Parameter(
        (_DIM,),
        Place("model.layers.{}.post_attention_layernorm.weight", (_DIM,)),
        Place("transformer/h/{}/ffn_norm/kernel", (_DIM,)),
        Place("blk.{}.ffn_norm.weight", (_DIM,)),
    ),
    "layers/mlp/gate": Parameter(
        (_DIM, _MLP),
        Place("model.layers.{}.mlp.gate_proj.weight", (_MLP, _DIM)),
        Place("transformer/h/{}/feed_forward/w1/kernel", (_DIM, _MLP)),
        Place("blk.{}.ffn_gate.weight", (_MLP, _DIM)),
    ),
    "layers/mlp/up": Parameter(
        (_DIM, _MLP),
        Place("model.layers.{}.mlp.up_proj.weight", (_MLP, _DIM)),
        Place("transformer/h/{}/feed_forward/w3/kernel", (_DIM, _MLP)),
        Place("blk.{}.ffn_up.weight", (_MLP, _DIM)),
    ),
    "layers/mlp/down": Parameter(
        (_MLP, _DIM),
        Place("model.layers.{}.mlp.down_proj.weight", (_DIM, _MLP)),
        Place("transformer/h/{}/feed_forward/w2/kernel", (_MLP, _DIM)),
        Place("blk.{}.ffn_down.weight", (_DIM, _MLP)),
    ),
    "final_norm": Parameter(
        (_DIM,),
        Place("model.norm.weight", (_DIM,)),
        Place("transformer/ln_f/kernel", (_DIM,)),
        Place("output_norm.weight", (_DIM,)),
    ),
    "head": Parameter(
        (_DIM, _VOCAB),
        Place("lm_head.weight", (_VOCAB, _DIM)),
        Place("lm_head/kernel", (_DIM, _VOCAB)),
        Place("output.weight", (_VOCAB, _DIM)),
    ),
}


class Tensor(NamedTuple):
    """One tensor of a format.

    Attributes:
      name: in the format.
      path: of our parameter, such as "layers/attention/query".
      layer: which layer's, 0 for a parameter that no layer has.
      shape: in the format.
    """

    name: str
    path: str
    layer: int
    shape: tuple[int, ...]


def paths(config: ModelConfig) -> list[str]:
    """Returns the paths of a model's parameters, in the table's order.

    Raises:
      ConversionError: a parameter that LLaMA doesn't have, such as a temperature.
    """
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = {path_name(path) for path, _ in leaves}
    unknown = sorted(found - PARAMETERS.keys())
    if unknown:
        raise ConversionError(f"LLaMA has no parameter {unknown[0]}: this model has no counterpart there")
    return [path for path in PARAMETERS if path in found]


def path_name(path: Sequence) -> str:
    """Returns the path of a leaf of params as this table names it."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of every factor."""
    return {
        "vocab": config.vocab_size,
        "dim": config.dim,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "pair": 2,
        "half": config.head_dim // 2,
        "mlp": config.mlp_dim,
    }


def shape(axes: Axes, size: dict[str, int]) -> tuple[int, ...]:
    """Returns the sizes of the axes."""
    return tuple(int(np.prod([size[factor] for factor in axis])) for axis in axes)


def arrange(array: np.ndarray, axes: Axes, wanted: Axes, size: dict[str, int]) -> np.ndarray:
    """Returns the array, whose axes are `axes`, with the axes `wanted`; a view where that is possible."""
    factors = [factor for axis in axes for factor in axis]
    order = [factors.index(factor) for axis in wanted for factor in axis]
    return array.reshape([size[factor] for factor in factors]).transpose(order).reshape(shape(wanted, size))


def tensors(config: ModelConfig, form: str) -> list[Tensor]:
    """Returns the tensors that a model has in a format, a field of `Parameter`, layer by layer.

    Raises:
      ConversionError: the format has no place for a parameter.
    """
    wanted, size = [], sizes(config)
    for path in paths(config):
        place = getattr(PARAMETERS[path], form)
        if place is None:
            raise ConversionError(f"{form} has no place for the parameter {path}")
        for layer in range(config.layers if path.startswith("layers/") else 1):
            wanted.append(Tensor(place.name.format(layer), path, layer, shape(place.axes, size)))
    first, last = ("embedding",), ("final_norm", "head")
    return sorted(wanted, key=lambda tensor: (tensor.path in last, tensor.path not in first, tensor.layer))
