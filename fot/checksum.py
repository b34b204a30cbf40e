"""Checksums in checkpoints: a flipped bit is an error, and does not become a weight or another document.

OCDBT checks its own tree of keys. What hangs on it, chunks of arrays, and the JSON beside it are checked by this.
"""

import json
import zlib
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

# Of a chunk. CRC-32C comes last, so it is of what is on disk; every reader of Zarr 3 verifies it.
CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
]


def arrays(processes: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Returns the handler that saves arrays with a checksum in each chunk.

    Such a checkpoint is an ordinary one to orbax. Whatever restores a chunk, whole or in part, verifies it.
    """
    tensorstore_utils._build_zarr3_metadata = _metadata  # orbax has no option for codecs; tests/test_checksum.py
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, multiprocessing_options=processes)


def _metadata(global_shape: Sequence[int], chunk_shape: Sequence[int], use_compression: bool) -> dict[str, Any]:
    """Returns the metadata of an array for TensorStore's driver zarr3."""
    del use_compression  # it is in the codecs
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    return {"shape": global_shape, "chunk_grid": grid, "codecs": CODECS}


def sealed(values: Any) -> dict[str, Any]:
    """Returns JSON values together with their checksum."""
    return {"crc32": _crc(values), "values": values}


def unsealed(saved: Any) -> Any:
    """Returns the values that `sealed` was given; what was saved before there were checksums is as it is.

    Raises:
      ValueError: the checksum is of other values.
    """
    if not isinstance(saved, dict) or saved.keys() != {"crc32", "values"}:
        return saved
    if _crc(saved["values"]) != saved["crc32"]:
        raise ValueError("the checksum is of other values")
    return saved["values"]


def _crc(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
