"""Tasks: where the documents of a run come from, and which of them are held out."""

import collections
import functools
import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fot.config import DataConfig, SourceConfig
from fot.data import cache, download, files, joined, seqio_tasks
from fot.data.files import Bad, Document, File
from fot.errors import DataError, UserError

SPLITS = ("train", "held_out")

STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "pydoc_data", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)

_log = logging.getLogger(__name__)

Wanted = Callable[[str], bool]


def check_split(split: str) -> None:
    """Raises UserError if the flag --split names no split."""
    if split not in SPLITS:
        raise UserError(f"--split={split} is not one of {', '.join(SPLITS)}")


class Task(NamedTuple):
    """A kind of source.

    Attributes:
      read: yields what it finds, always in the same order, of the documents whose names are wanted.
      origin: gives what changes when the documents do, cheaply.
    """

    read: Callable[[SourceConfig, DataConfig, Wanted], Iterator[Document | Bad]]
    origin: Callable[[SourceConfig, DataConfig], Iterable[str]]


def _of_files(
    find: Callable[[SourceConfig, DataConfig], list[File]],
    read: Callable[[list[File], str, Wanted], Iterator[Document | Bad]],
    stamp: Callable[[File], str] = files.stamp,
) -> Task:
    """Returns the task that reads files; `stamp` tells a file's content from another's without reading it."""

    def found(source: SourceConfig, config: DataConfig) -> list[File]:
        matched = find(source, config)
        if not matched:
            where = f"data.files={source.files!r} matches no file" if source.files else "no files found"
            raise DataError(f"data.task={source.task} has no documents: {where}")
        return matched

    return Task(
        lambda source, config, wanted: read(found(source, config), source.field, wanted),
        lambda source, config: map(stamp, found(source, config)),
    )


def _of_package(package: download.Package) -> Task:
    """Returns the task that reads a package: its files are the same wherever and whenever it was unpacked."""
    return _of_files(
        lambda source, config: download.documents(package, config),
        _one_by_one,
        lambda file: f"{package.name}:{package.sha256}:{file.name}:{os.path.getsize(file.path)}",
    )


def _standard_library(source: SourceConfig, config: DataConfig) -> list[File]:
    """Returns the modules of the running interpreter's standard library, its tests left out; names are relative."""
    found = files.find(f"{sysconfig.get_path('stdlib')}/**/*.py")
    return [file for file in found if not STDLIB_SKIPPED_FOLDERS.intersection(file.name.split("/")[:-1])]


def _matched(source: SourceConfig, config: DataConfig) -> list[File]:
    return files.find(source.files)


def _one_by_one(found: list[File], field: str, wanted: Wanted) -> Iterator[Document | Bad]:
    for file in found:
        yield from files.read(file, field, wanted)


TASKS = {
    "python_stdlib": _of_files(_standard_library, _one_by_one),
    "files": _of_files(_matched, _one_by_one),
    "directories": _of_files(_matched, joined.directories),
    "repositories": _of_files(_matched, joined.repositories),
    "isabelle": _of_files(_matched, joined.isabelle),
    "sympy": _of_package(download.SYMPY),
    "books": _of_package(download.BOOKS),
    "hol_light": _of_package(download.HOL_LIGHT),
    "seqio": Task(seqio_tasks.read_registered, seqio_tasks.origin),
    "c4": Task(seqio_tasks.read_c4, seqio_tasks.origin),
    "pg19": Task(seqio_tasks.read_pg19, seqio_tasks.origin),
}


def is_held_out(name: str, fraction: float) -> bool:
    """Tells whether the document `name` is held out: a hash of the name alone decides, on every host and run."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def documents(source: SourceConfig, config: DataConfig, split: str) -> Iterator[Document]:
    """Yields the documents of one split of a source, always in the same order; one is in memory at a time.

    Documents that can't be read are left out with one warning at the end, under `data.bad_documents=skip`.

    Args:
      split: "train" or "held_out".

    Raises:
      DataError: the split is empty, or a document can't be read under `data.bad_documents=refuse`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")

    def wanted(name: str) -> bool:
        return is_held_out(name, config.held_out_fraction) == (split == "held_out")

    count, first, bad = 0, {}, collections.Counter()
    for each in TASKS[source.task].read(source, config, wanted):
        if isinstance(each, Document):
            count += 1
            yield each
        elif config.bad_documents == "refuse":
            raise DataError(f"{each.kind} {_where(each)}: {files.KINDS[each.kind]}, or set data.bad_documents=skip")
        else:
            bad[each.kind] += 1
            first.setdefault(each.kind, each)
    skipped = "; ".join(f"{number} × {kind}, first {_where(first[kind])}" for kind, number in bad.items())
    if count == 0:
        remedy = "raise" if split == "held_out" else "lower"
        raise DataError(
            f"data.task={source.task} has no document in the {split} split: {remedy} "
            f"data.held_out_fraction={config.held_out_fraction} or add documents"
            + (f" (left out: {skipped})" if skipped else "")
        )
    if skipped:
        _warn(f"data.task={source.task}, {split} split: left out {skipped}")


def fingerprint(source: SourceConfig, config: DataConfig) -> str:
    """Returns what tells a source's documents from others without reading them: names, sizes, times, settings."""
    settings = (source.task, source.field, str(config.held_out_fraction))
    return cache.key([*settings, *TASKS[source.task].origin(source, config)])


@functools.cache
def _warn(message: str) -> None:
    """Logs a warning once: a source may be read for its tokenizer first and for its tokens then."""
    _log.warning(message)


def _where(bad: Bad) -> str:
    return f"{bad.where} ({bad.reason})" if bad.reason else bad.where
