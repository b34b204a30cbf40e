"""Files that are there whole or not at all, whenever a process is killed."""

import os
import pathlib
import tempfile
from collections.abc import Callable
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
