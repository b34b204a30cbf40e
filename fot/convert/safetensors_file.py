"""Safetensors files, read and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, first byte and
end), and the tensors' bytes. The library of that name writes a file only from all its tensors at once.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from fot.errors import ConversionError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BLOCK = 1 << 24  # bytes that are made contiguous and cast at once
_LARGEST_HEADER = 100_000_000  # bytes, as in the format's specification


class Stored(NamedTuple):
    """A tensor in a file: its dtype's name, its shape, and where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def index(path: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a file by name.

    Raises:
      ConversionError: it isn't a safetensors file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LARGEST_HEADER:
                raise ValueError("the header's length is impossible")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        stored = {
            name: Stored(each["dtype"], tuple(each["shape"]), 8 + length + each["data_offsets"][0])
            for name, each in header.items()
        }
        end = max((8 + length + each["data_offsets"][1] for each in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} is not a safetensors file ({error}): download it again") from None
    if path.stat().st_size < end:
        raise ConversionError(f"{path} has {path.stat().st_size:,} of {end:,} bytes: download it again")
    return stored


def read(path: pathlib.Path, tensor: Stored) -> np.ndarray:
    """Returns one tensor, in the dtype it is stored in.

    Raises:
      ConversionError: a dtype that isn't a plain floating-point number.
    """
    if tensor.dtype not in DTYPES:
        raise ConversionError(f"{path} holds tensors of dtype {tensor.dtype}: only {', '.join(DTYPES)} can be imported")
    return np.fromfile(path, DTYPES[tensor.dtype], math.prod(tensor.shape), offset=tensor.offset).reshape(tensor.shape)


class Source(NamedTuple):
    """A tensor to write: its name and shape, and a function that gives its values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write(file: BinaryIO, tensors: list[Source], dtype: np.dtype) -> None:
    """Writes tensors, cast to `dtype`, to an open file; holds one of them at a time."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        _write_rows(file, tensor.read(), dtype)


def _write_rows(file: BinaryIO, array: np.ndarray, dtype: np.dtype) -> None:
    rows = max(1, BLOCK * len(array) // max(array.size * dtype.itemsize, 1))
    for first in range(0, len(array), rows):
        file.write(np.ascontiguousarray(array[first : first + rows], dtype).view(np.uint8).data)
