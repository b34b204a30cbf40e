"""EasyLM's streaming checkpoints: parameters alone, or a whole training state, of which the parameters are taken.

A file is a sequence of MessagePack pairs: the path of an array, a list of strings, and bytes, in which flax wrote the
array as MessagePack again. The file is indexed by walking over it, so arrays are read one by one, in any order.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fot.convert import hf_config, source, weights
from fot.convert.safetensors_file import DTYPES
from fot.convert.source import Source
from fot.convert.weights import Tensors
from fot.errors import ConversionError

# EasyLM's own names of fields of config.json.
_RENAMED = {"max_sequence_length": "max_position_embeddings"}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NDARRAY = 1  # flax's code of an extension that holds an array: (shape, name of the dtype, bytes)
_CHUNKED = "__msgpack_chunked_array__"  # flax's mark of an array in pieces, each at most 1 GiB
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


class Span(NamedTuple):
    """Bytes of the file: where they begin, how many; `code` of an extension, -1 for plain bytes."""

    offset: int
    size: int
    code: int


class Stored(NamedTuple):
    """An array in the file: shape, dtype, and the pieces that hold its values in order."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Span, ...]


def open_source(path: pathlib.Path, config_file: str, context: int) -> Source:
    """Opens a file that EasyLM's StreamingCheckpointer wrote.

    Args:
      path: the file.
      config_file: a JSON file with the model's config in EasyLM's or Hugging Face's names; "" if the caller knows it.
      context: tokens of a window if not those of the config, or 0.

    Raises:
      ConversionError: the file or the config can't be read.
    """
    config, origin = None, hf_config.Origin("llama", context)
    if config_file:
        values = _huggingface_names(source.read_json(pathlib.Path(config_file)))
        model, origin = hf_config.read(values, config_file, context)
        config = source.imported_config(model, origin.context)
    return Source(config, origin, {}, lambda model: weights.bind(open_tensors(path), model, "easylm", str(path)))


def _huggingface_names(values: dict[str, Any]) -> dict[str, Any]:
    if any(name in values for name in _RENAMED):
        # EasyLM's ids of bos and eos are its code's defaults, not those of the tokenizer.
        values = {_RENAMED.get(name, name): value for name, value in values.items() if name not in _IDS}
        values |= {"model_type": "longllama" if values.get("mem_layers") else "llama"}
        values |= {"bos_token_id": hf_config.BOS, "eos_token_id": hf_config.EOS}
    return values


def open_tensors(path: pathlib.Path) -> Tensors:
    """Returns the parameters in the file, under their paths from "transformer" or "lm_head" on.

    Raises:
      ConversionError: it isn't such a file, or is cut short.
    """
    try:
        stored = dict(_index(path))
    except OSError as error:
        raise ConversionError(f"can't read {path} ({error.strerror}): name the file itself") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise ConversionError(f"{path} is no streaming checkpoint of EasyLM, or it is cut short ({error})") from None
    if not stored:
        raise ConversionError(f"{path} holds no parameters of EasyLM")

    def read(name: str) -> np.ndarray:
        array = stored[name]
        dtype = _DTYPES[array.dtype]
        pieces = [np.fromfile(path, dtype, each.size // dtype.itemsize, offset=each.offset) for each in array.pieces]
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(array.shape)

    return Tensors({name: array.shape for name, array in stored.items()}, read)


def _index(path: pathlib.Path) -> Iterator[tuple[str, Stored]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            keys, value = _unpack(file)
            end = value.offset + value.size
            if end > size:
                raise EOFError("the last array is not all there")
            # A training state has params/params/… beside the optimizer's moments, which have the same names.
            while keys[0] == "params":
                keys = keys[1:]
            if keys[0] in ("transformer", "lm_head"):
                file.seek(value.offset)
                yield "/".join(keys), _stored(file)
            file.seek(end)


def _stored(file: BinaryIO) -> Stored:
    value = _unpack(file)
    if isinstance(value, Span):
        return _array(file, value)
    if not value.get(_CHUNKED):
        raise ValueError("a parameter is not an array")
    shape = tuple(value["shape"][str(i)] for i in range(len(value["shape"])))
    arrays = [_array(file, value["chunks"][str(i)]) for i in range(len(value["chunks"]))]
    return Stored(shape, arrays[0].dtype, tuple(piece for array in arrays for piece in array.pieces))


def _array(file: BinaryIO, span: Span) -> Stored:
    if span.code != _NDARRAY:
        raise ValueError(f"extension {span.code} is not an array")
    file.seek(span.offset)
    shape, dtype, data = _unpack(file)
    if dtype not in _DTYPES or data.size != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"an array of dtype {dtype}, shape {shape} and {data.size} bytes")
    return Stored(tuple(shape), dtype, (data,))


def _number(file: BinaryIO, size: int, signed: bool = False) -> int:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("the file ends in the middle of a value")
    return int.from_bytes(data, "big", signed=signed)


def _unpack(file: BinaryIO) -> Any:
    """Returns the next MessagePack value; of bytes and extensions, over which it steps, where they are."""
    kind = _number(file, 1)
    if kind < 0x80 or kind >= 0xE0:
        return kind if kind < 0x80 else kind - 256
    if kind < 0x90 or kind in (0xDE, 0xDF):
        count = kind & 0x0F if kind < 0x90 else _number(file, 2 << (kind - 0xDE))
        return {_unpack(file): _unpack(file) for _ in range(count)}
    if kind < 0xA0 or kind in (0xDC, 0xDD):
        count = kind & 0x0F if kind < 0xA0 else _number(file, 2 << (kind - 0xDC))
        return [_unpack(file) for _ in range(count)]
    if kind < 0xC0 or 0xD9 <= kind <= 0xDB:
        length = kind & 0x1F if kind < 0xC0 else _number(file, 1 << (kind - 0xD9))
        return file.read(length).decode()
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
    if 0xC4 <= kind <= 0xC6:
        return _span(file, _number(file, 1 << (kind - 0xC4)), extension=False)
    if 0xC7 <= kind <= 0xC9:
        return _span(file, _number(file, 1 << (kind - 0xC7)), extension=True)
    if 0xCC <= kind <= 0xCF:
        return _number(file, 1 << (kind - 0xCC))
    if 0xD0 <= kind <= 0xD3:
        return _number(file, 1 << (kind - 0xD0), signed=True)
    if 0xD4 <= kind <= 0xD8:
        return _span(file, 1 << (kind - 0xD4), extension=True)
    raise ValueError(f"no value begins with the byte {kind:#04x}")


def _span(file: BinaryIO, size: int, *, extension: bool) -> Span:
    code = _number(file, 1, signed=True) if extension else -1
    span = Span(file.tell(), size, code)
    file.seek(size, 1)
    return span
