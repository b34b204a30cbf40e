"""Text and JSONL files to documents: plain, .gz or .zst; local, or wherever `tf.io.gfile` reads."""

import contextlib
import glob
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from fot.errors import DataError

READ_AT_ONCE = 1 << 20  # bytes
JSONL = (".jsonl", ".json", ".ndjson")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")


class File(NamedTuple):
    """A file that hasn't been read yet. `name` is the same on every host; `path` need not be."""

    name: str
    path: str


class Document(NamedTuple):
    """A document's name and its text, every character and line ending as in the file."""

    name: str
    text: str


class Bad(NamedTuple):
    """What was found in the place of a document.

    Attributes:
      kind: entry of `KINDS`.
      where: file, and the line if there is one.
      reason: a few words on this case; may be empty.
    """

    kind: str
    where: str
    reason: str = ""


# What can be wrong with a document, and what the user can do about it.
KINDS = {
    "unreadable file": "make it readable",
    "truncated archive": "fetch it again",
    "damaged archive": "fetch it again",
    "invalid UTF-8": "convert it to UTF-8",
    "broken JSON line": "mend it",
    "line without the field": "set data.field to the field that holds the text",
    "field that isn't text": "set data.field to the field that holds the text",
}


class _Unreadable(Exception):
    """Carries the `Bad` that ends a file."""

    def __init__(self, bad: Bad):
        super().__init__(bad)
        self.bad = bad


def find(pattern: str) -> list[File]:
    """Returns the files that a glob matches, ordered by name (`**` crosses folders).

    Names are relative to the part of the glob before its first wildcard, so they don't depend on where a host
    keeps the files.
    """
    if _is_remote(pattern):
        matched = _glob_remote(pattern)
    else:
        pattern = os.path.normpath(os.path.expanduser(pattern))
        matched = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    folders = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")
    root = "".join(folders[:2])
    return sorted(File(path.removeprefix(root), path) for path in set(matched))


def stamp(file: File) -> str:
    """Returns what changes when a file does: its name, size and time, without reading it."""
    try:
        if _is_remote(file.path):
            with _remote_errors():
                stat = _gfile().stat(file.path)
            return f"{file.name}:{stat.length}:{stat.mtime_nsec}"
        stat = os.stat(file.path)
        return f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}"
    except OSError:
        return f"{file.name}:unreadable"  # for `read` to say


def read(file: File, field: str, wanted: Callable[[str], bool]) -> Iterator[Document | Bad]:
    """Yields the documents of a file: its text, or one of each line of JSONL, called '<file>:<line number>'.

    Args:
      field: for JSONL, the field that holds the text; `a.b` is field b of field a.
      wanted: tells from its name whether a document is to be read.
    """
    if file.name.removesuffix(".gz").removesuffix(".zst").endswith(JSONL):
        yield from _read_lines(file, field, wanted)
    elif wanted(file.name):
        text = read_text(file)
        yield text if isinstance(text, Bad) else Document(file.name, text)


def read_text(file: File) -> str | Bad:
    """Returns the whole text of a file."""
    try:
        return b"".join(_chunks(file.path)).decode()
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", file.path, f"byte {error.start}")
    except _Unreadable as error:
        return error.bad


def no_field(where: str, field: str, value: Any) -> Bad:
    """Returns what to yield where `value` has not the field that holds the text."""
    names = ", ".join(map(repr, list(value)[:8])) if isinstance(value, dict) else f"a {type(value).__name__}"
    return Bad("line without the field", where, f"no {field!r} in {names or 'an empty object'}")


def _read_lines(file: File, field: str, wanted: Callable[[str], bool]) -> Iterator[Document | Bad]:
    try:
        for number, line in enumerate(_lines(_chunks(file.path)), start=1):
            name = f"{file.name}:{number}"
            if wanted(name) and line.strip():
                text = _text_of(line, field, f"{file.path}:{number}")
                yield text if isinstance(text, Bad) else Document(name, text)
    except _Unreadable as error:
        yield error.bad


def _text_of(line: bytes, field: str, where: str) -> str | Bad:
    """Returns the text in one line of JSONL; `where` is the line's file and number."""
    try:
        value: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", where, f"byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Bad("broken JSON line", where, str(error).partition(":")[0])
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return no_field(where, field, value)
        value = value[part]
    if not isinstance(value, str):
        return Bad("field that isn't text", where, f"{field!r} is {type(value).__name__}")
    try:
        value.encode()  # JSON can escape half a character
    except UnicodeEncodeError:
        return Bad("invalid UTF-8", where, f"lone surrogate in {field!r}")
    return value


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file that comes in chunks."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    if last := b"".join(parts):
        yield last


def _chunks(path: str) -> Iterator[bytes]:
    """Yields the content of a file, unpacked, piece by piece; raises `_Unreadable` where it can't go on."""
    with contextlib.closing(_raw_chunks(path)) as raw:
        if path.endswith(".gz"):
            yield from _unpack(raw, lambda: zlib.decompressobj(wbits=31), zlib.error, path)
        elif path.endswith(".zst"):
            import zstandard

            # A frame may name a window of up to 2 GB (zstd --long=31); memory is taken as it is needed.
            decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            yield from _unpack(raw, decompressor.decompressobj, zstandard.ZstdError, path)
        else:
            yield from raw


def _unpack(raw: Iterable[bytes], new: Callable[[], Any], failure: type[Exception], path: str) -> Iterator[bytes]:
    """Unpacks the archives that follow one another in `raw`, each by an object that `new` makes."""
    archive, begun = new(), False
    try:
        for chunk in raw:
            while chunk:
                if archive.eof:
                    chunk = chunk.lstrip(b"\0")  # some archives are padded
                    archive, begun = new(), False
                if chunk:
                    begun = True
                    yield archive.decompress(chunk)
                    chunk = archive.unused_data if archive.eof else b""
    except failure as error:
        raise _Unreadable(Bad("damaged archive", path, str(error).strip())) from None
    if not archive.eof and begun:
        raise _Unreadable(Bad("truncated archive", path))


def _raw_chunks(path: str) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while chunk := file.read(READ_AT_ONCE):
                yield chunk
    except OSError as error:
        raise _Unreadable(Bad("unreadable file", path, error.strerror or str(error))) from None


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading; every failure until it is closed is an `OSError`."""
    if _is_remote(path):
        with _remote_errors(), _gfile().GFile(path, "rb") as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def _is_remote(path: str) -> bool:
    return _SCHEME.match(path) is not None


def _gfile() -> Any:
    try:
        import tensorflow as tf
    except ImportError:
        raise DataError("paths with a scheme need TensorFlow: run 'pip install fot[seqio]' or copy the files") from None
    return tf.io.gfile


@contextlib.contextmanager
def _remote_errors() -> Iterator[None]:
    """Turns TensorFlow's errors into `OSError`."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(error.message) from None


def _glob_remote(pattern: str) -> list[str]:
    """Returns the files that a glob matches; gfile itself doesn't know `**`."""
    gfile = _gfile()
    head, deep, tail = pattern.partition("**/")
    try:
        with _remote_errors():
            heads = [parent.rstrip("/") + "/" for parent, _, _ in gfile.walk(head)] if deep else [head]
            return [path for each in heads for path in gfile.glob(each + tail) if not gfile.isdir(path)]
    except OSError as error:
        raise DataError(f"can't list data.files={pattern!r} ({error}): name a glob of files that can be read") from None
