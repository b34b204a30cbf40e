"""Memories on disk: a folder of arrays that can be read piece by piece, and the model that they belong to."""

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fot import config as config_lib
from fot import files
from fot.config import INDIFFERENT, ModelConfig
from fot.errors import UserError
from fot.memory import Memory

ABOUT = "memory.json"
ARRAYS = ("keys", "values", "documents", "written")  # the fields of a memory that are stored, each in a file
_REMEDY = "free disk space or choose another folder"


class Owner(NamedTuple):
    """The model that a memory belongs to.

    Attributes:
      model: its config.
      fingerprint: of its parameters, see `fingerprint`.
    """

    model: ModelConfig
    fingerprint: str


def owner(params: Any, config: ModelConfig) -> Owner:
    """Returns who owns the memories that these parameters fill."""
    return Owner(config, fingerprint(params))


def fingerprint(params: Any) -> str:
    """Returns 64 hex digits of all parameters, names and bits; the same wherever and however they are spread."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        local = np.asarray(leaf) if _is_local(leaf) else multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(f"{jax.tree_util.keystr(path)} {local.dtype} {local.shape}\n".encode())
        digest.update(np.ascontiguousarray(local).view(np.uint8))
    return digest.hexdigest()


def _is_local(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def save(memory: Memory, owner: Owner, folder: pathlib.Path) -> None:
    """Writes a memory to a new folder, which is there whole or not at all.

    Raises:
      UserError: the folder exists or can't be written, or parts of the memory are with other processes.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: choose another folder for the memory")
    held = {name: getattr(memory, name) for name in ARRAYS}
    if not all(map(_is_local, held.values())):
        raise UserError(f"can't write {folder}: the memory is spread over several processes; fill it in one")
    arrays = {name: {"shape": list(x.shape), "dtype": jnp.dtype(x.dtype).name} for name, x in held.items()}
    about = {"arrays": arrays, "model": config_lib.to_dict(owner.model), "fingerprint": owner.fingerprint}
    with files.new_folder(folder, _REMEDY) as new:
        for name, array in held.items():
            _write(new / f"{name}.npy", array)
        (new / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load(folder: pathlib.Path, owner: Owner) -> Memory:
    """Returns the memory in a folder as memory-mapped numpy arrays: what isn't used isn't read.

    What is written to the arrays stays in this process.

    Raises:
      UserError: there is none, it is damaged, or it belongs to another model or other parameters.
    """
    about = _about(folder)
    _check_owner(folder, about, owner)
    return Memory(**{name: _read(folder / f"{name}.npy", about["arrays"][name]) for name in ARRAYS})


def _write(path: pathlib.Path, array: jax.Array | np.ndarray) -> None:
    """Writes a .npy file; of a jax.Array shard by shard, so that it never exists twice."""
    stored = _stored(array.dtype)
    with open(path, "w+b") as file:
        header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_2_0(file, header)
        file.flush()
        begin, size = file.tell(), array.size * stored.itemsize
        if size == 0:
            return
        os.posix_fallocate(file.fileno(), begin, size)  # a full disk is an error here, and a crash in what follows
        mapped = np.memmap(file, stored, "r+", begin, array.shape)
        for index, part in _parts(array):
            mapped[index] = part.view(stored)
        mapped.flush()


def _parts(array: jax.Array | np.ndarray) -> list[tuple[Any, np.ndarray]]:
    if not isinstance(array, jax.Array):
        return [(..., array)]
    return [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards if shard.replica_id == 0]


def _stored(dtype: Any) -> np.dtype:
    """Returns the dtype on disk: .npy knows no bfloat16, its bits are stored as uint16."""
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else np.dtype(dtype)


def _read(path: pathlib.Path, about: dict[str, Any]) -> np.ndarray:
    shape, dtype = tuple(about["shape"]), jnp.dtype(about["dtype"])
    try:
        # An empty array can't be mapped.
        array = np.load(path, mmap_mode="c" if np.prod(shape) else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): fill the memory again") from None
    if array.shape != shape or array.dtype != _stored(dtype):
        raise UserError(
            f"{path} is damaged: it holds {array.dtype}{list(array.shape)} and {ABOUT} says {about['dtype']}"
            f"{list(shape)}: fill the memory again"
        )
    return array.view(dtype)


def _about(folder: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        for name in ARRAYS:
            tuple(about["arrays"][name]["shape"]), jnp.dtype(about["arrays"][name]["dtype"])
        dict(about["model"]), str(about["fingerprint"])
    except OSError as error:
        raise UserError(f"no memory in {folder} ({ABOUT}: {error.strerror}): save one there first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / ABOUT} is damaged ({type(error).__name__}: {error}): fill the memory again"
        ) from None
    return about


def _check_owner(folder: pathlib.Path, about: dict[str, Any], owner: Owner) -> None:
    now, then = json.loads(json.dumps(config_lib.to_dict(owner.model))), about["model"]  # tuples are lists in both
    different = [
        f"model.{name}: {then.get(name, 'missing')!r} there, {value!r} here"
        for name, value in now.items()
        if name not in INDIFFERENT and (name not in then or then[name] != value)
    ]
    if different:
        raise UserError(f"the memory in {folder} belongs to another model ({'; '.join(different)}): fill one with this")
    if about["fingerprint"] != owner.fingerprint:
        raise UserError(
            f"the memory in {folder} belongs to other parameters of this model (fingerprint "
            f"{about['fingerprint'][:12]} there, {owner.fingerprint[:12]} here): fill one with these"
        )
