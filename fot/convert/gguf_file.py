"""GGUF files of llama.cpp with architecture llama: weights of any type that the gguf package can dequantize."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fot.config import ModelConfig, RopeScalingConfig
from fot.convert import gguf_tokenizer, source, weights
from fot.convert.hf_config import ROPE_THETA, Origin
from fot.convert.source import Source
from fot.convert.weights import Tensors
from fot.errors import ConfigError, ConversionError

ARCHITECTURE = "llama"
BLOCK = 1 << 22  # values that are dequantized at once
# LLaMA 3.1 to 3.3: llama.cpp stores what these make of the frequencies, and not the numbers themselves.
_LLAMA3 = {"low_factor": 1.0, "high_factor": 4.0, "original_context": 8192}


def open_source(path: pathlib.Path, context: int) -> Source:
    """Opens a file.

    Args:
      path: the file.
      context: tokens of a window if not those of the file, or 0.

    Raises:
      ConversionError: it is no such file, of another architecture, or what it says can't be imported.
    """
    reader = _open(path)
    fields = _metadata(reader)
    arrays = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in arrays.items()}

    def read(name: str) -> np.ndarray:
        return _values(arrays[name], shapes[name], f"{path}: {name}")

    model = _model(fields, shapes, read, str(path))
    context = context or _need(fields, "context_length", str(path))
    tokenizer = gguf_tokenizer.convert(fields)
    ids = {f"{name}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return Source(
        source.imported_config(model, context),
        Origin("llama", context, token_ids={name: int(value) for name, value in ids.items() if value is not None}),
        tokenizer.files,
        lambda config: weights.bind(Tensors(shapes, read), config, "gguf", str(path)),
        tokenizer.notes,
    )


def _open(path: pathlib.Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ConversionError(f"{path} needs the package gguf: run 'pip install fot[convert]'") from None
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ConversionError(f"can't read {path} ({error.strerror}): name the file itself") from None
    except (ValueError, IndexError, KeyError) as error:
        raise ConversionError(f"{path} is not a GGUF file, or it is cut short ({error})") from None


def _metadata(reader: Any) -> dict[str, Any]:
    """Returns the metadata as plain values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def _need(fields: Mapping[str, Any], name: str, path: str) -> Any:
    if fields.get(f"{ARCHITECTURE}.{name}") is None:
        raise ConversionError(f"{path}: the field {ARCHITECTURE}.{name} is missing")
    return fields[f"{ARCHITECTURE}.{name}"]


def _model(fields: Mapping[str, Any], shapes: Mapping[str, tuple], read: Any, path: str) -> ModelConfig:
    if fields.get("general.architecture") != ARCHITECTURE:
        raise ConversionError(
            f"{path}: general.architecture={fields.get('general.architecture')!r}: only {ARCHITECTURE} can be imported"
        )
    if fields.get(f"{ARCHITECTURE}.expert_count"):
        raise ConversionError(f"{path}: {ARCHITECTURE}.expert_count: mixtures of experts can't be imported")
    if "token_embd.weight" not in shapes:
        raise ConversionError(f"{path}: the tensor token_embd.weight is missing")
    dim, heads = _need(fields, "embedding_length", path), _need(fields, "attention.head_count", path)
    head_dim = fields.get(f"{ARCHITECTURE}.attention.key_length", dim // max(heads, 1))
    turned = fields.get(f"{ARCHITECTURE}.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise ConversionError(f"{path}: {ARCHITECTURE}.rope.dimension_count={turned}: it must be a head's {head_dim}")
    theta = float(fields.get(f"{ARCHITECTURE}.rope.freq_base", ROPE_THETA))
    factors_H = read("rope_freqs.weight") if "rope_freqs.weight" in shapes else None
    try:
        return ModelConfig(
            vocab_size=shapes["token_embd.weight"][0],
            layers=_need(fields, "block_count", path),
            dim=dim,
            heads=heads,
            kv_heads=fields.get(f"{ARCHITECTURE}.attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp_dim=_need(fields, "feed_forward_length", path),
            mlp="swiglu",
            memory_layers=(),
            memory_positions="zero",
            qk_norm=False,
            tied_embeddings="output.weight" not in shapes,
            rope_theta=theta,
            rope_scaling=_scaling(fields, factors_H, theta, path),
            norm_epsilon=float(f"{_need(fields, 'attention.layer_norm_rms_epsilon', path):.6g}"),  # stored as a float32
        )
    except ConfigError as error:
        raise ConversionError(f"{path}: {error}") from None


def _scaling(fields: Mapping[str, Any], factors_H: np.ndarray | None, theta: float, path: str) -> RopeScalingConfig:
    """Returns how frequencies are stretched; `factors_H` is what each of them is divided by."""
    name = f"{ARCHITECTURE}.rope.scaling"
    kind = fields.get(f"{name}.type", "linear")  # older files have a factor alone
    factor = float(fields.get(f"{name}.factor", fields.get(f"{ARCHITECTURE}.rope.scale_linear", 1)))
    if kind not in ("none", "linear"):
        raise ConversionError(f"{path}: {name}.type={kind!r}: only none and linear can be imported")
    linear = kind == "linear" and factor != 1
    if factors_H is None or np.all(factors_H == 1):
        return RopeScalingConfig(kind="linear", factor=factor) if linear else RopeScalingConfig()
    scaling = RopeScalingConfig(kind="llama3", factor=float(factors_H.max()), **_LLAMA3)
    half = len(factors_H)
    turns = scaling.original_context * theta ** (-np.arange(half) / half) / (2 * np.pi)
    kept = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
    if linear or not np.allclose(1 / factors_H, kept + (1 - kept) / scaling.factor, rtol=1e-4):
        raise ConversionError(f"{path}: rope_freqs.weight: these frequencies aren't those of LLaMA 3.1, 3.2 or 3.3")
    return scaling


def _values(tensor: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Returns a tensor in float32 or, if it is stored so, float16; a block of it is dequantized at a time."""
    import gguf

    kind = tensor.tensor_type
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        return np.array(tensor.data, plain[kind]).reshape(shape)
    rows = np.reshape(tensor.data, (-1, tensor.data.shape[-1]))
    values = np.empty((len(rows), shape[-1]), np.float32)
    step = max(1, BLOCK // shape[-1])
    try:
        for first in range(0, len(rows), step):
            values[first : first + step] = gguf.dequantize(rows[first : first + step], kind)
    except NotImplementedError:
        raise ConversionError(f"{name} has the type {kind.name}, which the package gguf can't dequantize") from None
    return values.reshape(shape)
