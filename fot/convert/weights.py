"""Weights, one layer of one parameter at a time: from the tensors of a file to sharded arrays, never all at once."""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fot import model, sharding
from fot.config import ModelConfig
from fot.convert import llama
from fot.errors import ConversionError

ALIGNMENT = 64  # bytes; arrays that begin at a multiple of it become arrays of a CPU device without a copy

# (path, layer) -> that layer's parameter in our layout, in the dtype it is stored in; a view of a fresh array.
Read = Callable[[str, int], np.ndarray]


class Tensors(NamedTuple):
    """The tensors of a checkpoint: shapes by name, and a function that reads the one of that name."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


# Tensors that hold nothing of the model: RoPE's frequencies, which follow from the config.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope_freqs\.weight")


def bind(stored: Tensors, config: ModelConfig, form: str, origin: str) -> Read:
    """Returns how a model's parameters are read from the tensors of a format.

    Args:
      stored: the tensors.
      config: the model.
      form: the format, a field of `llama.Parameter`.
      origin: what to call the checkpoint in errors.

    Raises:
      ConversionError: names every tensor that is missing, is too many, or has another shape.
    """
    wanted = {(tensor.path, tensor.layer): tensor for tensor in llama.tensors(config, form)}
    shapes = {tensor.name: tensor.shape for tensor in wanted.values()}
    unused = _tied_head(config, form)
    faults = [f"{name} is missing" for name in shapes if name not in stored.shapes]
    for name, found in stored.shapes.items():
        if name not in shapes and name not in unused and not IGNORED.fullmatch(name):
            faults.append(f"{name} {list(found)} is too many")
        elif name in shapes and tuple(found) != shapes[name]:
            faults.append(f"{name} is {list(found)} and not {list(shapes[name])}")
    if faults:
        raise ConversionError(f"{origin} doesn't hold the tensors of its config: {'; '.join(faults)}")
    size = llama.sizes(config)

    def read(path: str, layer: int) -> np.ndarray:
        parameter = llama.PARAMETERS[path]
        array = stored.read(wanted[path, layer].name)
        return llama.arrange(array, getattr(parameter, form).axes, parameter.axes, size)

    return read


def _tied_head(config: ModelConfig, form: str) -> set[str]:
    """Returns the name of the output head if it is the embedding: some files hold it twice."""
    return {getattr(llama.PARAMETERS["head"], form).name} if config.tied_embeddings else set()


def load(read: Read, config: ModelConfig, mesh: Mesh) -> model.Params:
    """Returns the parameters on the mesh, in the dtype that `model.init` gives them.

    The host holds one layer of one parameter, and the parts of one parameter that its own devices get.
    """

    def leaf(path: tuple, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        return _place(read, llama.path_name(path), abstract)

    return jax.tree_util.tree_map_with_path(leaf, sharding.abstract_params(model.init, config, mesh))


def _place(read: Read, path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    shape = abstract.shape
    indices = abstract.sharding.addressable_devices_indices_map(shape).values()
    parts = {_bounds(index, shape): _aligned(index, abstract) for index in indices}
    layers = shape[0] if path.startswith("layers/") else 1
    for layer in range(layers):
        array = read(path, layer)
        for bounds, part in parts.items():
            if path.startswith("layers/"):
                part[layer] = array[tuple(slice(*ends) for ends in bounds[1:])]
            else:
                part[...] = array[tuple(slice(*ends) for ends in bounds)]
        del array
    return jax.make_array_from_callback(shape, abstract.sharding, lambda index: parts[_bounds(index, shape)])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(each.indices(length)[:2] for each, length in zip(index, shape, strict=True))


def _aligned(index: tuple[slice, ...], abstract: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns an empty array for that part of the parameter."""
    shape = [stop - start for start, stop in _bounds(index, abstract.shape)]
    size = math.prod(shape) * abstract.dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(abstract.dtype).reshape(shape)


def of_params(params: model.Params) -> Read:
    """Returns how parameters on a mesh are read: a layer at a time comes to the host."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    arrays = {llama.path_name(path): leaf for path, leaf in leaves}

    def read(path: str, layer: int) -> np.ndarray:
        array = arrays[path]
        return np.asarray(array[layer] if path.startswith("layers/") else array)

    return read
