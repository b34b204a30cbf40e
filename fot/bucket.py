"""Cloud Storage: paths in buckets, objects read and written whole, and errors in one line.

Needs the extra gcs: google-cloud-storage here, gcsfs for the paths that orbax takes. Credentials are those of the
machine: its service account's, or those of `gcloud auth application-default login`. Without a bucket, neither is used.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fot.errors import UserError

SCHEME = "gs://"
PACKAGES = ("gcsfs", "google.cloud.storage")
SECONDS = 60.0  # that a request has, repeated after errors that pass, before the bucket is taken for unreachable
ROLES = "roles storage.objectUser and storage.legacyBucketReader"


class Content(NamedTuple):
    """What an object holds.

    Attributes:
      data: the whole of it.
      generation: changes with every write; the one to name so that nobody else's write is lost.
    """

    data: bytes
    generation: int


def is_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def path(name: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine, or one in a bucket that has the same methods.

    Raises:
      UserError: the bucket can't be reached, it is asked once; or the path is of another scheme.
    """
    if not is_bucket(name):
        if "://" in os.fspath(name):
            raise UserError(f"{name} is of no storage that is known here: name a folder, or {SCHEME}bucket/folder")
        return pathlib.Path(name)
    with errors(name):
        from etils import epath

        _opened(_split(name)[0])
        return epath.Path(name)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns an absolute path, as those in buckets are."""
    return path if is_bucket(path) else path.absolute()


def folder(flag: str, name: str) -> pathlib.Path:
    """Returns a path of this machine; raises UserError, naming the flag, if it is in a bucket."""
    if is_bucket(name):
        raise UserError(f"--{flag}={name} is in a bucket: name a folder of this machine")
    return pathlib.Path(name)


def read(url: str) -> Content | None:
    """Returns what an object holds, None if there is no such object; raises UserError."""
    with errors(url):
        from google.api_core import exceptions

        blob = _blob(url)
        try:
            return Content(blob.download_as_bytes(retry=_retry()), blob.generation)
        except exceptions.NotFound:
            return None


def write(url: str, data: bytes, over: int | None = None) -> int | None:
    """Creates or replaces an object: a reader finds the old one or the new.

    Args:
      url: of the object.
      data: all that it holds then.
      over: the generation that it replaces, 0 for no object; None replaces any.

    Returns:
      Its generation; None if what is there is not of generation `over`.

    Raises:
      UserError: the bucket can't be written.
    """
    with errors(url):
        from google.api_core import exceptions

        blob = _blob(url)
        try:
            blob.upload_from_string(data, "application/octet-stream", if_generation_match=over, retry=_retry())
            return blob.generation
        except exceptions.PreconditionFailed:
            pass
    # A request whose answer was lost is sent again, and then its own work is in its way.
    there = read(url)
    return there.generation if there and there.data == data else None


def delete(url: str, over: int) -> None:
    """Deletes an object, if it is of generation `over`; raises UserError."""
    with errors(url):
        from google.api_core import exceptions

        with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
            _blob(url).delete(if_generation_match=over, retry=_retry())


@contextlib.contextmanager
def errors(url: str | os.PathLike) -> Iterator[None]:
    """Turns what Google's libraries and gcsfs raise during the block into a UserError, if the path is in a bucket."""
    if not is_bucket(url):
        yield
        return
    _require(os.fspath(url))
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth

    try:
        yield
    except UserError:
        raise
    except api.NotFound:
        name = SCHEME + _split(url)[0]
        raise UserError(
            f"{url}: there is no bucket {name}: gcloud storage buckets create {name} --location=REGION makes it"
        ) from None
    except (auth.GoogleAuthError, api.Unauthorized) as error:
        raise UserError(
            f"{url}: no credentials ({_reason(error)}): gcloud auth application-default login, or give the machine a "
            "service account"
        ) from None
    except Exception as error:  # gcsfs and aiohttp have many
        if isinstance(error, api.Forbidden) or str(error).startswith("Forbidden"):
            raise UserError(
                f"{url}: no permission ({_reason(error)}): the account of this machine needs the {ROLES} on the bucket"
            ) from None
        raise UserError(
            f"{url} can't be reached ({_reason(error)}): look at the network; the same command goes on"
        ) from error


@functools.cache
def _opened(name: str) -> Any:
    """Returns the client's bucket, which is there and may be read; sets up the other libraries for it, too."""
    from google.cloud import storage

    _set_up()
    return storage.Client().get_bucket(name, retry=_retry())


def _set_up() -> None:
    """Has etils read and write by gcsfs, plainly: without TensorFlow, gRPC, kept listings, and many words."""
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    from etils.epath import gpath

    gpath._is_tf_installed.cache_clear()  # it may have looked before
    for protocol in ("gs", "gcs"):  # what other processes write must be seen
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    for library in ("gcsfs", "google.auth"):  # what they log, with tracebacks, comes as one UserError
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _require(url: str) -> None:
    """Raises UserError if a package is missing."""
    for name in PACKAGES:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UserError(f"{url} needs the package {name}: pip install -c constraints.txt -e '.[gcs]'")


def _blob(url: str) -> Any:
    bucket, name = _split(url)
    return _opened(bucket).blob(name)


def _split(url: str | os.PathLike) -> tuple[str, str]:
    """Returns bucket and name of an object."""
    bucket, _, name = os.fspath(url).removeprefix(SCHEME).partition("/")
    return bucket, name


def _retry() -> Any:
    from google.cloud.storage import retry

    return retry.DEFAULT_RETRY.with_timeout(SECONDS)


def _reason(error: BaseException) -> str:
    """Returns the line of an error that says why, without the request that it answers."""
    try:
        text = error.response.json()["error"]["message"]
    except (AttributeError, KeyError, TypeError, ValueError):
        text = getattr(error, "message", "") or str(error)
    lines = text.strip().splitlines()
    line = lines[-1 if text.startswith("Forbidden") else 0] if lines else type(error).__name__
    return re.sub(r"^[A-Z]+ http\S+: ", "", line).rstrip(".")
