"""Writes a Hugging Face folder: plain LLaMA or Qwen2, or LongLLaMA with the code that runs it."""

import functools
import json
import math
import pathlib
from typing import Any

import numpy as np

from fot import files
from fot.config import ModelConfig
from fot.convert import llama, safetensors_file
from fot.convert.llama import Tensor
from fot.convert.safetensors_file import DTYPES
from fot.convert.source import Source
from fot.convert.weights import Read
from fot.convert.workdir import REMEDY, write_files

CODE = pathlib.Path(__file__).parent / "torch_model"


def code_files() -> dict[str, bytes]:
    """Returns the Python files that ship inside a LongLLaMA folder."""
    return {path.name: path.read_bytes() for path in sorted(CODE.glob("*.py")) if path.name != "__init__.py"}


def write(
    target: pathlib.Path,
    opened: Source,
    model: ModelConfig,
    values: dict[str, Any],
    read: Read,
    code: dict[str, bytes],
    shard_bytes: int,
) -> None:
    """Writes the folder, tensor by tensor; it is there whole or not at all.

    Args:
      target: the folder, which must not exist.
      opened: gives tokenizer, ids and generation_config.json.
      model: the model.
      values: the content of config.json, whose dtype is that of the weights.
      read: the weights.
      code: files that lie beside them.
      shard_bytes: of a file of weights at the most, but for a single larger tensor.

    Raises:
      UserError: the folder can't be written.
    """
    size = llama.sizes(model)

    def tensor(wanted: Tensor) -> np.ndarray:
        parameter = llama.PARAMETERS[wanted.path]
        return llama.arrange(read(wanted.path, wanted.layer), parameter.axes, parameter.huggingface.axes, size)

    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    dtype = DTYPES[names[values["dtype"]]]
    shards = _shards(llama.tensors(model, "huggingface"), dtype, shard_bytes)
    generation = opened.origin.generation or {"_from_model_config": True, **opened.origin.token_ids}
    with files.new_folder(target, REMEDY) as folder:
        write_files(folder, opened.tokenizer | code)
        write_files(folder, {"config.json": _json(values), "generation_config.json": _json(generation)})
        for name, shard in shards.items():
            sources = [
                safetensors_file.Source(each.name, each.shape, functools.partial(tensor, each)) for each in shard
            ]
            with open(folder / name, "wb") as file:
                safetensors_file.write(file, sources, dtype)
        if len(shards) > 1:
            total = sum(_bytes(each, dtype) for shard in shards.values() for each in shard)
            placed = {each.name: name for name, shard in shards.items() for each in shard}
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            write_files(folder, {"model.safetensors.index.json": _json(index)})


def _shards(tensors: list[Tensor], dtype: np.dtype, most: int) -> dict[str, list[Tensor]]:
    """Returns the tensors of each file by its name."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _bytes(tensor, dtype) > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor, dtype)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def _bytes(tensor: Tensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
