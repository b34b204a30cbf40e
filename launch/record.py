"""What a workdir keeps of each launch: the job, and the state of the source, to the letter."""

import contextlib
import datetime
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from fot import bucket, files
from fot.errors import UserError
from launch import shell

FOLDER = "launch"  # in the workdir
LIMIT = 50 * 2**20  # bytes of files that git neither tracks nor ignores
ABSENT = ("matched no objects", "NotFound", "not found")  # what gcloud says of an object that is not there
ANSWER = 120.0  # seconds that git and gcloud have for an answer


class Source(NamedTuple):
    """The source as it is, committed or not.

    Attributes:
      root: of the repository; "" if there is none.
      commit: that is checked out; "" before the first.
      tree: git's object of all files that it doesn't ignore, as they are now.
      patch: from the commit to the tree; "" if they are the same.
    """

    root: str
    commit: str
    tree: str
    patch: str


def source() -> Source:
    """Returns the state of the repository around the present folder; its index and its files stay as they are.

    Raises:
      UserError: git failed, or untracked files are too large to be recorded.
    """
    found = shell.run(["git", "rev-parse", "--show-toplevel"], ANSWER)
    if found.code:
        return Source("", "", "", "")
    root = found.out.rstrip("\n")
    git = ["git", "-C", root]
    loose = shell.must([*git, "ls-files", "-z", "--others", "--exclude-standard"], ANSWER).split("\0")
    size = sum(os.path.getsize(path) for path in (os.path.join(root, name) for name in loose if name))
    if size > LIMIT:
        raise UserError(f"{size / 2**20:.0f} MiB of files are not ignored by git, nor tracked: add them to .gitignore")
    with tempfile.TemporaryDirectory() as folder:
        index = [*("env", f"GIT_INDEX_FILE={folder}/index"), *git]
        shell.must([*index, "add", "--all"], ANSWER)
        tree = shell.must([*index, "write-tree"], ANSWER).strip()
    head = shell.run([*git, "rev-parse", "--verify", "--quiet", "HEAD"], ANSWER)
    commit = head.out.strip()
    patch = shell.must([*git, "diff", "--binary", commit, tree], ANSWER) if commit else ""
    return Source(root, commit, tree, patch)


def save(workdir: str, values: dict[str, Any], state: Source) -> None:
    """Writes the launch into the workdir, which shows that it can be written; earlier launches stay beside it.

    Raises:
      UserError: the workdir can't be written.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S")
    git = {"commit": state.commit, "tree": state.tree, "dirty": bool(state.patch)}
    text = json.dumps({"launched": stamp, "git": git, **values}, indent=2) + "\n"
    if state.patch:
        _write(workdir, f"{stamp}/source.patch", state.patch)
    _write(workdir, f"{stamp}/job.json", text)
    _write(workdir, "job.json", text)


def load(workdir: str) -> dict[str, Any]:
    """Returns what the newest launch has written into the workdir.

    Raises:
      UserError: there is nothing to read.
    """
    found = newest(workdir)
    if not found:
        raise UserError(f"{_path(workdir, 'job.json')} does not exist: nothing was launched in this --workdir")
    return found


def newest(workdir: str) -> dict[str, Any]:
    """Returns what the newest launch has written into the workdir, {} if there was none.

    Raises:
      UserError: it can't be read.
    """
    text = _read(workdir)
    try:
        return json.loads(text) if text else {}
    except ValueError:
        raise UserError(f"{_path(workdir, 'job.json')} is damaged: launch again, or name another --workdir") from None


def end(workdir: str, code: int) -> None:
    """Writes with which exit code the newest launch has ended; raises UserError as `save` does."""
    _add(workdir, ended=code)


def stop(workdir: str, stopped: bool = True) -> None:
    """Writes that the newest launch is stopped on purpose, or is not; raises UserError as `save` does."""
    _add(workdir, stopped=stopped)


def stopped(workdir: str) -> bool:
    """Returns whether the newest launch was stopped on purpose; raises UserError as `newest` does."""
    return bool(newest(workdir).get("stopped", False))


def _add(workdir: str, **fields: Any) -> None:
    _write(workdir, "job.json", json.dumps({**load(workdir), **fields}, indent=2) + "\n")


def _read(workdir: str) -> str:
    """Returns the file of the newest launch, "" if there is none."""
    path = _path(workdir, "job.json")
    if bucket.is_bucket(workdir):
        done = shell.run(["gcloud", "storage", "cat", path], ANSWER)
        if done.code and not any(words in done.err for words in ABSENT):
            raise UserError(f"can't read {path} ({done.reason}): look at the network, or log in by gcloud")
        return "" if done.code else done.out
    try:
        return pathlib.Path(path).read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror}): name another --workdir") from None


def _write(workdir: str, name: str, text: str) -> None:
    path = _path(workdir, name)
    if bucket.is_bucket(workdir):
        done = shell.run(["gcloud", "storage", "cp", "-", path], ANSWER, text)
        if done.code:
            raise UserError(
                f"--workdir={workdir} can't be written ({done.reason}): choose another, or log in by gcloud"
            )
        return
    data = text.encode("utf-8", "surrogateescape")
    files.write(pathlib.Path(path), lambda file: file.write(data), "choose another --workdir")


def _path(workdir: str, name: str) -> str:
    folder = workdir if bucket.is_bucket(workdir) else os.path.expanduser(workdir)
    return f"{folder.rstrip('/')}/{FOLDER}/{name}"


@contextlib.contextmanager
def packed(state: Source) -> Iterator[str]:
    """Gives a file with the whole source, .tar.gz, during the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/source.tar.gz"
        shell.must(["git", "-C", state.root, "archive", "--format=tar.gz", f"--output={path}", state.tree], ANSWER)
        yield path
