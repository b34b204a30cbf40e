"""Tasks: where the documents of a run come from, and which of them are held out."""

import glob
import hashlib
import logging
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fot.config import DataConfig, SourceConfig
from fot.data import cache
from fot.errors import DataError

SPLITS = ("train", "held_out")
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "pydoc_data", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)

_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """A document that hasn't been read yet. `name` is the same on every host; `path` need not be."""

    name: str
    path: pathlib.Path


class Document(NamedTuple):
    """A document's name and its text, every character and line ending as in the file."""

    name: str
    text: str


def python_stdlib(config: SourceConfig) -> list[Source]:
    """Returns the modules of the running interpreter's standard library, its tests left out; names are relative."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    sources = []
    for parent, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_SKIPPED_FOLDERS]
        paths = [pathlib.Path(parent, file) for file in files if file.endswith(".py")]
        sources += [Source(path.relative_to(root).as_posix(), path) for path in paths]
    return sources


def text_files(config: SourceConfig) -> list[Source]:
    """Returns the files that the glob `files` matches (`**` crosses folders).

    Names are relative to the part of the glob before its first wildcard, so they don't depend on where a host
    keeps the files.
    """
    pattern = os.path.expanduser(config.files)
    fixed = pathlib.Path(pattern)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    root = fixed if fixed.is_dir() else fixed.parent
    paths = [pathlib.Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return [Source(path.relative_to(root).as_posix(), path) for path in paths]


TASKS: dict[str, Callable[[SourceConfig], list[Source]]] = {"python_stdlib": python_stdlib, "files": text_files}


def is_held_out(name: str, fraction: float) -> bool:
    """Tells whether the document `name` is held out: a hash of the name alone decides, on every host and run."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def documents(source: SourceConfig, config: DataConfig, split: str) -> Iterator[Document]:
    """Reads the documents of one split of a source, one by one, in the order of their names.

    Args:
      split: "train" or "held_out".

    Raises:
      DataError: the source has no documents, or one can't be read.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    sources = sorted(TASKS[source.task](source))
    if not sources:
        where = f"data.files={source.files!r} matches no file" if source.files else "no files found"
        raise DataError(f"data.task={source.task} has no documents: {where}")
    for each in sources:
        if is_held_out(each.name, config.held_out_fraction) == (split == "held_out"):
            text = _read(each.path)
            if text is None:
                _log.warning("%s is not UTF-8: left out", each.path)
            else:
                yield Document(each.name, text)


def fingerprint(source: SourceConfig, config: DataConfig) -> str:
    """Returns what tells a source's documents from others without reading them all: names, sizes and times of files."""
    files = [(each.name, each.path.stat()) for each in sorted(TASKS[source.task](source))]
    return cache.key([source.task, *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in files)])


def _read(path: pathlib.Path) -> str | None:
    """Returns the text of a file, or None if it isn't UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"can't read {path} ({error.strerror}): make it readable or leave it out") from None
