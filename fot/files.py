"""Files and folders that are there whole or not at all, whenever a process is killed."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from fot.errors import UserError


def write(path: pathlib.Path, fill: Callable[[BinaryIO], object], remedy: str) -> None:
    """Creates or replaces the file `path` at once: a reader finds the old file or the new, whoever writes beside.

    Args:
      path: the file; its folder is made if need be.
      fill: writes the content to the open binary file that it is given.
      remedy: what the user can do if the folder can't be written, for the error's message.

    Raises:
      UserError: the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as file:
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
