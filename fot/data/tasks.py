"""Tasks: where the documents of a run come from, and which of them are held out."""

import glob
import hashlib
import logging
import os
import pathlib
import sysconfig
from collections.abc import Callable
from typing import NamedTuple

from fot.config import DataConfig
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


def python_stdlib(config: DataConfig) -> list[Source]:
    """Returns the modules of the running interpreter's standard library, its tests left out; names are relative."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    sources = []
    for parent, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_SKIPPED_FOLDERS]
        paths = [pathlib.Path(parent, file) for file in files if file.endswith(".py")]
        sources += [Source(path.relative_to(root).as_posix(), path) for path in paths]
    return sources


def text_files(config: DataConfig) -> list[Source]:
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


TASKS: dict[str, Callable[[DataConfig], list[Source]]] = {"python_stdlib": python_stdlib, "files": text_files}


def is_held_out(name: str, fraction: float) -> bool:
    """Tells whether the document `name` is held out: a hash of the name alone decides, on every host and run."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def documents(config: DataConfig, split: str) -> list[Document]:
    """Reads the documents of one split of `config.task`, in the order of their names.

    Files that aren't UTF-8 are left out and counted in the log.

    Args:
      split: "train" or "held_out".

    Raises:
      DataError: the task has no documents, the split is empty, or a file can't be read.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    sources = sorted(TASKS[config.task](config))
    if not sources:
        where = f"data.files={config.files!r} matches no file" if config.files else "no files found"
        raise DataError(f"data.task={config.task} has no documents: {where}")
    held_out = split == "held_out"
    chosen = [source for source in sources if is_held_out(source.name, config.held_out_fraction) == held_out]
    texts = [Document(source.name, text) for source in chosen if (text := _read(source.path)) is not None]
    if len(texts) < len(chosen):
        _log.warning("%d of %d %s documents are not UTF-8: left out", len(chosen) - len(texts), len(chosen), split)
    if not texts:
        remedy = "raise" if held_out else "lower"
        raise DataError(
            f"none of the {len(sources)} documents of data.task={config.task} is in the {split} split: "
            f"{remedy} data.held_out_fraction={config.held_out_fraction} or add UTF-8 documents"
        )
    return texts


def _read(path: pathlib.Path) -> str | None:
    """Returns the text of a file, or None if it isn't UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"can't read {path} ({error.strerror}): make it readable or leave it out") from None
