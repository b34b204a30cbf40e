"""Optuna's side of a sweep: its storage, and its words for ranges, values and pruners."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import Any, final

from fot.errors import UserError
from launch import points
from launch.space import Choice, Halving, Integer, LogReal, Median, Range

JOURNAL = "trials.journal"
DRIVER = "postgresql+psycopg://"
INSTALL = "a sweep needs {}: pip install fot[sweep]"


def library() -> Any:
    """Returns Optuna, silent; raises UserError if it isn't installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(INSTALL.format("Optuna")) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def opened(optuna: Any, workdir: pathlib.Path, url: str) -> Any:
    """Returns the storage at a URL, or in the workdir if that is ""; made if missing."""
    if url:
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    path = workdir / JOURNAL
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_JournalLock(path))
    return optuna.storages.JournalStorage(backend)


def close(opened: Any) -> None:
    """Closes the connections of a storage, if it has any."""
    if hasattr(opened, "engine"):
        opened.remove_session()
        opened.engine.dispose()


def exists(workdir: pathlib.Path) -> bool:
    """Returns whether a workdir has a sweep's storage."""
    return (workdir / JOURNAL).exists()


@final
class _JournalLock:
    """Lock of the journal: ends with its process, and mends what a killed writer has left."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def acquire(self) -> bool:
        """Waits for the lock, and takes half a line off the journal."""
        self._file = open(f"{self._path}.lock", "ab")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with open(self._path, "rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            whole = size
            while whole and _byte(journal, whole - 1) != b"\n":
                whole -= 1
            if whole < size:
                journal.truncate(whole)
        return True

    def release(self) -> None:
        """Gives it back."""
        self._file.close()


def _byte(file: Any, position: int) -> bytes:
    file.seek(position)
    return file.read(1)


def server(url: str) -> str:
    """Returns a storage's URL as PostgreSQL's own programs take it.

    Raises:
      UserError: it is none of PostgreSQL, or the driver isn't installed.
    """
    if not url.startswith(DRIVER):
        raise UserError(f"--storage must read {DRIVER}user:password@host/database, or be left out for a file")
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise UserError(INSTALL.format("psycopg for --storage")) from None
    return url.replace(DRIVER, "postgresql://", 1)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns what a storage says in the block into one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("sqlalchemy", "optuna", "psycopg"):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the sweep's storage: {reason}; with that mended, the same command goes on") from None


def plain(value: Any) -> Any:
    """Returns a value as Optuna keeps it: a tuple as text."""
    return value if isinstance(value, bool | int | float | str) else points.text(value)


def plain_values(values: Any) -> list[Any]:
    """Returns each value once, as Optuna keeps it."""
    # 1 and True are equal, and so are 1 and 1.0: told apart by their text.
    return list({points.text(value): plain(value) for value in values}.values())


def distribution(optuna: Any, range_: Range) -> Any:
    """Returns a range as Optuna's distribution."""
    kinds = optuna.distributions
    if isinstance(range_, Choice):
        return kinds.CategoricalDistribution(plain_values(range_.values))
    if isinstance(range_, Integer):
        last = range_.low + (range_.high - range_.low) // range_.step * range_.step
        return kinds.IntDistribution(range_.low, last, step=range_.step)
    return kinds.FloatDistribution(float(range_.low), float(range_.high), log=isinstance(range_, LogReal))


def value_of(range_: Range, suggested: Any) -> Any:
    """Returns what Optuna has suggested as a value of the field."""
    if isinstance(range_, Choice):
        return next(value for value in range_.values if plain(value) == suggested)
    return suggested


def pruner_of(optuna: Any, pruner: Median | Halving | None) -> Any:
    """Returns Optuna's pruner."""
    if isinstance(pruner, Median):
        return optuna.pruners.MedianPruner(n_startup_trials=pruner.trials, n_warmup_steps=pruner.steps)
    if isinstance(pruner, Halving):
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=pruner.steps, reduction_factor=pruner.factor)
    return optuna.pruners.NopPruner()
