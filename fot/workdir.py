"""Where a run writes: a folder of this machine, or one in a bucket.

A folder is held by the kernel's lock and written as it is. In a bucket, only checkpoints are written at once; metrics,
TensorBoard, tokenizer, traces and reports go to a folder of this machine, and from there, file by file and whole, to
the bucket: at each save, at the end, and every `lease.BEAT` seconds, by each process its own.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

import jax

from fot import bucket, distributed, files, lease, metrics, profiling
from fot.errors import UserError
from fot.lease import Lease


class Folder(NamedTuple):
    """A workdir on this machine.

    Attributes:
      local: the workdir.
      checkpoints: where its checkpoints are.
    """

    local: pathlib.Path
    checkpoints: pathlib.Path

    def sync(self) -> None:
        """Does nothing: all is in its place."""

    def close(self) -> None:
        """Does nothing: the kernel's lock ends with the process."""


@final
class Mirror:
    """A workdir in a bucket, and the folder of this machine that its small files are copied from; a context manager.

    Attributes:
      local: the folder of this machine.
      checkpoints: where checkpoints are, in the bucket.
    """

    def __init__(self, url: str, held: Lease | None, fetched: Sequence[str]):
        """Args: url: gs://…; held: the lease, of the first process; fetched: files that are gone on with."""
        self.checkpoints = bucket.path(url) / "checkpoints"
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="fot-"))
        self._url, self._lease = url, held
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._turn, self._closed = threading.Lock(), threading.Event()
        for name in fetched:
            if there := bucket.read(f"{url}/{name}"):
                (self.local / name).write_bytes(there.data)
                self._copied[self.local / name] = _state(self.local / name)
        self._thread = threading.Thread(target=self._keep, name="fot-workdir", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # don't hide what ended the run

    def sync(self) -> None:
        """Shows that this run holds the workdir, and copies what has changed to the bucket.

        Raises:
          UserError: the bucket can't be written, or another run has taken it over.
        """
        with self._turn:
            if self._closed.is_set():
                return
            if self._lease is not None:
                self._lease.renew()
            for path in sorted(self.local.rglob("*")):
                if path.is_file() and path.suffix != ".tmp":
                    self._copy(path)

    def close(self) -> None:
        """Copies the last, leaves the workdir to others and removes the local folder; raises what `sync` does."""
        try:
            self.sync()
            with self._turn:
                if self._lease is not None:
                    self._lease.release()
        finally:
            self._closed.set()
            shutil.rmtree(self.local, ignore_errors=True)

    def _copy(self, path: pathlib.Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # replaced just now; the next time
            state = _state(path)  # of before it is read: what is written meanwhile is for the next time
            if self._copied.get(path) != state:
                bucket.write(f"{self._url}/{path.relative_to(self.local)}", path.read_bytes())
                self._copied[path] = state

    def _keep(self) -> None:
        while not self._closed.wait(lease.BEAT):
            with contextlib.suppress(UserError):  # the main thread's next sync meets it, too
                self.sync()


def _state(path: pathlib.Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


Workdir = Folder | Mirror


@contextlib.contextmanager
def opened(name: str | os.PathLike, log: Callable[[str], None]) -> Iterator[Workdir]:
    """Gives the workdir of a run, held by its first process, during the block.

    Args:
      name: folder, or gs://bucket/folder.
      log: is told of a wait.

    Raises:
      UserError: another run holds it, or it can't be written.
    """
    first = distributed.is_first()
    if not bucket.is_bucket(name):
        path = pathlib.Path(name)
        with files.hold(path) if first else contextlib.nullcontext():
            yield Folder(path, path / "checkpoints")
        return
    url = str(bucket.path(name))
    held = Lease(url, log) if first else None
    if held is not None:
        held.acquire()
    # Others must not look for a checkpoint before the run before this one has saved its last.
    distributed.agree("workdir held", 1, distributed.JOIN)
    fetched = (*((metrics.FILE,) if first else ()), profiling.HANG_FILE.format(jax.process_index()))
    with Mirror(url, held, fetched) as mirror:
        yield mirror
