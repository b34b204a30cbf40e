"""Hugging Face folders: config.json, and weights in safetensors or PyTorch files, one or many."""

import dataclasses
import functools
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from fot.convert import hf_config, safetensors_file, source, weights
from fot.convert.source import Source
from fot.convert.weights import Tensors
from fot.errors import ConversionError

# Names of whole files and of indices of many, the best first.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_source(path: pathlib.Path, context: int) -> Source:
    """Opens a folder as transformers' `save_pretrained` writes it.

    Args:
      path: the folder.
      context: tokens of a window if not those of config.json, or 0.

    Raises:
      ConversionError: config.json or the weights are missing, damaged, or not those of a LLaMA.
    """
    model, origin = hf_config.read(source.read_json(path / "config.json"), str(path / "config.json"), context)
    generation = path / "generation_config.json"
    if generation.is_file():
        origin = dataclasses.replace(origin, generation=source.read_json(generation))
    return Source(
        source.imported_config(model, origin.context),
        origin,
        source.tokenizer_files(path),
        lambda config: weights.bind(open_tensors(path), config, "huggingface", str(path)),
    )


def open_tensors(folder: pathlib.Path) -> Tensors:
    """Returns the tensors of a folder's weights.

    Raises:
      ConversionError: there are none, or a file of them is missing or damaged.
    """
    found = next((name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise ConversionError(f"{folder} has no weights: it must hold one of {', '.join(FILES)}")
    names = [found]
    if found.endswith(".index.json"):
        placed = source.read_json(folder / found).get("weight_map")
        if not isinstance(placed, dict):
            raise ConversionError(f"{folder / found} has no weight_map: download it again")
        names = sorted(set(placed.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing)}: download it again")
    open_file = _safetensors if "safetensors" in found else _torch
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for name in names:
        opened = open_file(folder / name)
        shapes |= opened.shapes
        readers |= {tensor: functools.partial(opened.read, tensor) for tensor in opened.shapes}
    return Tensors(shapes, lambda name: readers[name]())


def _safetensors(path: pathlib.Path) -> Tensors:
    stored = safetensors_file.index(path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return Tensors(shapes, lambda name: safetensors_file.read(path, stored[name]))


def _torch(path: pathlib.Path) -> Tensors:
    """Opens a file that torch.save wrote; its tensors are mapped, not read, unless it is of before torch 1.6."""
    torch = _import_torch(path)
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{path} holds no PyTorch weights ({reason}): download it again") from None
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if tensor.dtype == torch.bfloat16:  # which NumPy doesn't know by itself
            return tensor.view(torch.uint16).numpy().view(safetensors_file.DTYPES["BF16"])
        return tensor.numpy()

    return Tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, read)


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ConversionError(f"{path} needs the package torch: run 'pip install fot[torch]'") from None
    return torch
