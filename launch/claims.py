"""Who runs a trial: locks that end with the process that holds them, however it ends."""

import contextlib
import hashlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO, final

from fot import files
from fot.errors import UserError

POLL = 0.05  # seconds between two attempts at a lock that is waited for
# A server that can't be reached for so long counts as gone, so that another machine may take the trial over.
KEEPALIVE = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4}
TIMEOUT = {"connect_timeout": 10, "tcp_user_timeout": 30_000}  # seconds; milliseconds


class Claims(Protocol):
    """Locks by name. What is held stays held until `release`, or until this process ends."""

    def take(self, name: str) -> bool:
        """Locks the name, at once, and returns True; False if anyone, this process too, holds it."""

    def release(self, name: str) -> None:
        """Gives the name back."""

    def check(self) -> None:
        """Raises UserError if locks may have been lost."""

    def close(self) -> None:
        """Gives everything back."""


@contextlib.contextmanager
def waited(claims: Claims, name: str) -> Iterator[None]:
    """Holds a name during the block, once whoever holds it has given it back."""
    while not claims.take(name):
        time.sleep(POLL)
    try:
        yield
    finally:
        claims.release(name)


@final
class FolderClaims:
    """Locks of files in a folder, for the processes of one machine."""

    def __init__(self, folder: pathlib.Path):
        """Args: folder: made if missing; the files that stay in it hold nothing."""
        self._folder, self._files = folder, dict[str, TextIO]()

    def take(self, name: str) -> bool:
        """As `Claims.take`; raises UserError if the folder can't be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = open(self._folder / name, "a+", encoding="utf-8")
            try:
                files.lock(file)
            except BaseException:
                file.close()
                raise
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(f"can't lock {self._folder / name} ({error.strerror}): choose another --workdir") from None
        self._files[name] = file
        return True

    def release(self, name: str) -> None:
        """As `Claims.release`."""
        self._files.pop(name).close()

    def check(self) -> None:
        """Does nothing: the kernel loses no lock."""

    def close(self) -> None:
        """As `Claims.close`."""
        for name in list(self._files):
            self.release(name)


@final
class ServerClaims:
    """PostgreSQL's advisory locks, which the server releases when the connection ends, for many machines."""

    def __init__(self, url: str, scope: str):
        """Args: url: postgresql://…; scope: of the names, others' are other locks. Raises UserError: no answer."""
        import psycopg

        self._scope, self._held, self._errors = scope, set[str](), psycopg.Error
        with self._told():
            self._connection: Any = psycopg.connect(url, autocommit=True, **KEEPALIVE, **TIMEOUT)

    def take(self, name: str) -> bool:
        """As `Claims.take`; raises UserError if the server doesn't answer."""
        # The server would lock a second time for the same connection.
        if name in self._held or not self._ask("SELECT pg_try_advisory_lock(%s)", self._number(name)):
            return False
        self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """As `Claims.release`; raises UserError if the server doesn't answer."""
        self._ask("SELECT pg_advisory_unlock(%s)", self._number(name))
        self._held.remove(name)

    def check(self) -> None:
        """Raises UserError if the connection is lost, and with it the locks."""
        self._ask("SELECT %s", 1)

    def close(self) -> None:
        """As `Claims.close`."""
        self._connection.close()

    def _ask(self, query: str, value: int) -> Any:
        with self._told():
            return self._connection.execute(query, (value,)).fetchone()[0]

    def _number(self, name: str) -> int:
        digest = hashlib.sha256(f"{self._scope}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            reason = (str(error).splitlines() or ["no answer"])[0]
            raise UserError(f"--storage: {reason}; with the server back, the same command goes on") from None
