"""Files and folders that are there whole or not at all, whenever a process is killed, and folders held by one."""

import contextlib
import fcntl
import glob
import io
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TextIO

from fot import bucket
from fot.errors import UserError

LOCK = "run.lock"


def write(path: pathlib.Path, fill: Callable[[BinaryIO], object], remedy: str) -> None:
    """Creates or replaces the file `path` at once: a reader finds the old file or the new, whoever writes beside.

    Args:
      path: the file, of this machine or in a bucket; its folder is made if need be.
      fill: writes the content to the open binary file that it is given.
      remedy: what the user can do if the folder can't be written, for the error's message.

    Raises:
      UserError: the folder can't be written.
    """
    if bucket.is_bucket(path):
        content = io.BytesIO()
        fill(content)
        bucket.write(str(path), content.getvalue())
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp", delete=False) as file:
            try:
                fill(file)
                file.flush()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror}): {remedy}") from None


def write_json(path: pathlib.Path, values: Any, remedy: str) -> None:
    """Writes values as JSON, like `write`; ValueError if one is no finite number."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write(path, lambda file: file.write(text.encode()), remedy)


@contextlib.contextmanager
def new_folder(path: pathlib.Path, remedy: str) -> Iterator[pathlib.Path]:
    """Creates the folder `path` at once: gives an empty folder to fill, which gets that name when the block ends.

    If the block raises, nothing is left. If another process was first, its folder stays and this one is dropped.

    Raises:
      UserError: it can't be written, for want of space or permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=path.name + "."))
        try:
            os.chmod(new, 0o755)
            yield new
            try:
                os.rename(new, path)
            except OSError:
                if not path.is_dir():
                    raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror}): {remedy}") from None


def sweep(path: pathlib.Path) -> None:
    """Deletes what killed writes of the file `path` have left; nobody else may be writing it."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Keeps every other `hold` of the folder out during the block; who only reads the folder needs none.

    The kernel releases the lock when the process ends, however it ends; the file that stays holds nothing.

    Raises:
      UserError: another process holds the folder, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write {folder / LOCK} ({error.strerror}): choose another workdir") from None
    with file:
        _lock(file, folder)
        yield


def lock(file: TextIO) -> None:
    """Locks the open file, until it is closed or the process ends, and writes into it by whom.

    Raises:
      BlockingIOError: it is locked.
      OSError: it can't be.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
    file.flush()


def _lock(file: TextIO, folder: pathlib.Path) -> None:
    """Locks the file of a folder; raises UserError."""
    try:
        lock(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use by {holder}: stop that one or choose another workdir") from None
    except OSError as error:
        raise UserError(f"can't lock {folder / LOCK} ({error.strerror}): choose another workdir") from None
