"""A model's config and Hugging Face's config.json, both directions: LLaMA, Mistral, Qwen2 and LongLLaMA.

What a config.json says and this package can't do is refused by name: nothing that changes what a model computes is
left out, and no default stands in for what the file says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fot.config import ModelConfig, RopeScalingConfig
from fot.errors import ConfigError, ConversionError

MODEL_TYPES = ("llama", "mistral", "qwen2", "longllama")
# What these architectures take where a config.json says nothing (older ones leave it out).
ROPE_THETA = 10_000.0
LAST_CONTEXT_LENGTH = 1024
MEMORY_DTYPE = "bfloat16"
BOS, EOS = 1, 2

# Fields that change what a model computes, and the values under which it is LLaMA.
_PLAIN: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_output_bias": (False,),
    "partial_rotary_factor": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "quantization_config": (),
    "num_experts": (),
    "num_local_experts": (),
    "logit_scale": (1,),
    "use_qk_norm": (False,),
}
_ROPE_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3"}
_ROPE_FIELDS = {"factor": "factor", "low_freq_factor": "low_factor", "high_freq_factor": "high_factor"}
_ROPE_FIELDS |= {"original_max_position_embeddings": "original_context"}
_ROPE_NEEDS = {"none": (), "linear": ("factor",), "llama3": tuple(_ROPE_FIELDS)}


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a checkpoint says beside the model's config, kept for an export.

    Attributes:
      model_type: "llama", "mistral", "qwen2" or "longllama".
      context: tokens, `max_position_embeddings`; of LongLLaMA, those of a window.
      dtype: "float32", "bfloat16" or "float16", of the stored weights.
      last_context_length: of LongLLaMA, tokens of the last window, those before which go to the memory.
      mem_dtype: of LongLLaMA, dtype of the memory.
      token_ids: ids of bos, eos and padding, under the names of config.json; eos may be several.
      generation: content of generation_config.json.
    """

    model_type: str
    context: int
    dtype: str = "float32"
    last_context_length: int = LAST_CONTEXT_LENGTH
    mem_dtype: str = MEMORY_DTYPE
    token_ids: dict[str, Any] = dataclasses.field(default_factory=lambda: {"bos_token_id": BOS, "eos_token_id": EOS})
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(values: Mapping[str, Any], name: str, context: int) -> tuple[ModelConfig, Origin]:
    """Returns the model, without memory layers unless it is LongLLaMA, and what else config.json says.

    Args:
      values: the content of config.json.
      name: of the file, for errors.
      context: tokens of a window if not those of the file; 0 leaves that to the file.

    Raises:
      ConversionError: one line naming the field that is missing, of a wrong type, or says what isn't LLaMA.
    """
    fields = _Fields(values, name)
    kind = fields.get("model_type", str)
    if kind not in MODEL_TYPES:
        raise fields.refused("model_type", kind, f"only {', '.join(MODEL_TYPES)} can be imported")
    for field, plain in _PLAIN.items():
        if values.get(field) is not None and values[field] not in plain:
            raise fields.refused(field, values[field], "this is not a plain LLaMA")
    bias = fields.get("attention_bias", bool, False)
    if bias and kind != "longllama":
        raise fields.refused("attention_bias", bias, "a bias of the output projection can't be imported")
    heads, dim = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    context = context or fields.get("max_position_embeddings", int)
    _check_window(fields, context)
    positions, layers = fields.get("mem_positionals", bool, True), fields.get("mem_layers", list, [])
    if not all(type(layer) is int for layer in layers):
        raise fields.refused("mem_layers", layers, "these must be numbers of layers")
    try:
        model = ModelConfig(
            vocab_size=fields.get("vocab_size", int),
            layers=fields.get("num_hidden_layers", int),
            dim=dim,
            heads=heads,
            kv_heads=fields.get("num_key_value_heads", int, heads),
            head_dim=fields.get("head_dim", int, dim // max(heads, 1)),
            mlp_dim=fields.get("intermediate_size", int),
            mlp="swiglu",
            memory_layers=tuple(sorted(layers)),
            memory_positions="zero" if positions else "none",
            qk_norm=False,
            logn_keys=fields.get("logn_keys", int, 0),
            tied_embeddings=fields.get("tie_word_embeddings", bool, False),
            qkv_bias=bias or kind == "qwen2",
            rope_theta=_rope_theta(fields),
            rope_scaling=_rope_scaling(fields),
            norm_epsilon=fields.get("rms_norm_eps", float),
        )
    except ConfigError as error:
        raise ConversionError(f"{name}: {error}") from None
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None}
    return model, Origin(
        kind,
        context,
        dtype if dtype in ("float32", "bfloat16", "float16") else "float32",
        fields.get("last_context_length", int, LAST_CONTEXT_LENGTH),
        fields.get("mem_dtype", str, MEMORY_DTYPE).removeprefix("torch."),
        ids,
    )


def write(model: ModelConfig, origin: Origin, context: int, dtype: str) -> dict[str, Any]:
    """Returns the config.json of a plain LLaMA, or of Qwen2 if there are biases, for transformers 4 and 5 alike.

    Raises:
      ConversionError: one line naming the field of the model that these can't express.
    """
    _check_plain(model)
    if model.memory_layers and model.memory_positions == "none":
        raise _inexpressible(
            "model.memory_positions=none", "LLaMA has positions in every layer: --to=longllama keeps it"
        )
    name, kind = ("Qwen2ForCausalLM", "qwen2") if model.qkv_bias else ("LlamaForCausalLM", "llama")
    return {"architectures": [name], "model_type": kind, **_shared(model, origin, context, dtype)}


def write_longllama(model: ModelConfig, origin: Origin, context: int, dtype: str) -> dict[str, Any]:
    """Returns the config.json of LongLLaMA, whose code lies beside it; raises what `write` does."""
    _check_plain(model)
    return {
        "architectures": ["LongLlamaForCausalLM"],
        "model_type": "longllama",
        "auto_map": {
            "AutoConfig": "configuration_longllama.LongLlamaConfig",
            "AutoModel": "modeling_longllama.LongLlamaModel",
            "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
        },
        **_shared(model, origin, context, dtype),
        "attention_bias": model.qkv_bias,
        "attention_output_bias": False,
        "mem_layers": list(model.memory_layers),
        "mem_positionals": model.memory_positions == "zero",
        "mem_dtype": origin.mem_dtype,
        "last_context_length": origin.last_context_length,
        "logn_keys": model.logn_keys,
    }


def _shared(model: ModelConfig, origin: Origin, context: int, dtype: str) -> dict[str, Any]:
    scaling = model.rope_scaling
    kind = next(theirs for theirs, ours in _ROPE_KINDS.items() if ours == scaling.kind)
    inverse = {theirs: getattr(scaling, ours) for theirs, ours in _ROPE_FIELDS.items()}
    stretch = {"rope_type": kind, **{name: inverse[name] for name in _ROPE_NEEDS[scaling.kind]}}
    values = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_theta": model.rope_theta,  # transformers 4 reads this and rope_scaling, transformers 5 rope_parameters
        "rope_parameters": {"rope_theta": model.rope_theta, **stretch},
        "torch_dtype": dtype,
        "dtype": dtype,
        **origin.token_ids,
    }
    if scaling.kind != "none":
        values["rope_scaling"] = stretch
    if not model.qkv_bias:
        values |= {"attention_bias": False, "mlp_bias": False}
    return values


class _Fields:
    """A config.json whose fields have types."""

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values, self.name = values, name

    def get(self, field: str, kind: type, default: Any = None) -> Any:
        """Returns the field; without it, or if it is null, the default, and an error without one."""
        value = self.values.get(field)
        if value is None and default is None:
            raise ConversionError(f"{self.name}: the field {field} is missing")
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConversionError(f"{self.name}: {field}={value!r} must be of type {kind.__name__}")
        return value

    def refused(self, field: str, value: Any, reason: str) -> ConversionError:
        return ConversionError(f"{self.name}: {field}={value!r}: {reason}")


def _check_window(fields: _Fields, context: int) -> None:
    """Raises ConversionError if tokens of a context don't see all of it."""
    if fields.values.get("model_type") == "qwen2" and not fields.get("use_sliding_window", bool, False):
        return
    window = fields.get("sliding_window", int, 0)
    if 0 < window < context:
        raise fields.refused(
            "sliding_window", window, f"a token doesn't see all of a context of {context}: give --context={window}"
        )


def _rope_theta(fields: _Fields) -> float:
    found = {}
    for group in ("rope_parameters", "rope_scaling"):
        inner = _Fields(fields.get(group, dict, {}), f"{fields.name}: {group}")
        if inner.values.get("rope_theta") is not None:
            found[f"{group}.rope_theta"] = inner.get("rope_theta", float)
    if "rope_theta" in fields.values:
        found["rope_theta"] = fields.get("rope_theta", float)
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ConversionError(f"{fields.name}: {told}: they must be equal")
    return next(iter(found.values()), ROPE_THETA)


def _rope_scaling(fields: _Fields) -> RopeScalingConfig:
    found = [_one_scaling(fields, group) for group in ("rope_parameters", "rope_scaling") if fields.values.get(group)]
    if len(set(found)) > 1:
        raise ConversionError(f"{fields.name}: rope_parameters and rope_scaling don't say the same")
    return found[0] if found else RopeScalingConfig()


def _one_scaling(fields: _Fields, group: str) -> RopeScalingConfig:
    inner = _Fields(fields.get(group, dict), f"{fields.name}: {group}")
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise inner.refused("rope_type", kind, f"only {', '.join(_ROPE_KINDS)} can be imported")
    needs = _ROPE_NEEDS[_ROPE_KINDS[kind]]
    for field, value in inner.values.items():
        known = field in needs or field in ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
        if not known and value is not None and not (field == "partial_rotary_factor" and value == 1):
            raise inner.refused(field, value, f"it can't be imported with rope_type={kind}")
    kinds = {"original_max_position_embeddings": int}
    given = {_ROPE_FIELDS[field]: inner.get(field, kinds.get(field, float)) for field in needs}
    return RopeScalingConfig(kind=_ROPE_KINDS[kind], **given)


def _check_plain(model: ModelConfig) -> None:
    if model.mlp != "swiglu":
        raise _inexpressible(f"model.mlp={model.mlp}", "LLaMA's is swiglu")
    if model.qk_norm:
        raise _inexpressible("model.qk_norm=true", "LLaMA doesn't normalise queries and keys")
    if model.memory_gate:
        raise _inexpressible("model.memory_gate=true", "LLaMA has no gate")


def _inexpressible(field: str, reason: str) -> ConversionError:
    return ConversionError(f"{field} can't be exported: {reason}")
