"""Files derived from documents (tokenizers, token arrays), kept on disk under a name that is a hash of their origin."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import BinaryIO

from fot import files
from fot.config import DataConfig


def folder(config: DataConfig) -> pathlib.Path:
    """Returns the cache folder: `cache_dir`, or `fot` in the user's cache folder when that is empty."""
    if config.cache_dir:
        return pathlib.Path(config.cache_dir).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fot"


def key(parts: Iterable[str | bytes]) -> str:
    """Returns 16 hex digits that name `parts`: the same in every process, other for any other sequence of parts."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


_REMEDY = "make room, or set data.cache_dir to a writable folder"


def write(path: pathlib.Path, fill: Callable[[BinaryIO], object]) -> None:
    """Creates or replaces a file of the cache at once; see `fot.files.write`."""
    files.write(path, fill, _REMEDY)


def new_folder(path: pathlib.Path) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Gives a folder to fill that becomes part of the cache at once; see `fot.files.new_folder`."""
    return files.new_folder(path, _REMEDY)
