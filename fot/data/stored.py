"""Stored documents: the tokens of a source in the files of a cache, memory-mapped.

On disk the tokens of a source are one plain array, and no format of records: a row then reads the slice of a document
that it needs, from anywhere, and nothing else.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import tqdm

from fot.data import encode, permutation
from fot.errors import DataError

FORMAT = "1"  # of the files
PROGRESS_AFTER = 2  # seconds


class Stored(NamedTuple):
    """The documents of one source as arrays, each `<bos> tokens <eos>`; a `Part`.

    Attributes:
      source: name of the source.
      tokens: all documents one after the other, uint16 or int32 [total].
      offsets: where in `tokens` each document begins, and the end of the last, int64 [documents + 1].
      names: names of the documents in UTF-8, one after the other, uint8.
      name_offsets: where in `names` each begins, and the end of the last, int64 [documents + 1].
      key: the same for the same names and tokens in the same order.
      counted: bool [total], whether a token counts as a target; None if all do.
    """

    source: str
    tokens: np.ndarray
    offsets: np.ndarray
    names: np.ndarray
    name_offsets: np.ndarray
    key: str
    counted: np.ndarray | None

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    @property
    def token_count(self) -> int:
        """Tokens of all documents together."""
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)

    def order(self, index: int, *key: int) -> int:
        """Returns the number of the index-th document: each epoch has all of them, in an order of its own."""
        epoch, place = divmod(index, self.documents)
        return permutation.shuffled(place, self.documents, *key, epoch)

    def name(self, number: int) -> str:
        """Returns the name of a document."""
        first, last = self.name_offsets[number : number + 2]
        return self.names[first:last].tobytes().decode("utf-8", "surrogateescape")

    def length(self, number: int) -> int:
        """Returns the tokens of a document."""
        return int(self.offsets[number + 1]) - int(self.offsets[number])

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` to `stop` of a document; touches no other token."""
        first = int(self.offsets[number])
        return self.tokens[first + start : first + stop].astype(np.int32)

    def weights(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns, for the same tokens, 1 where the document has a next one and that counts, float32."""
        first, end = int(self.offsets[number]), int(self.offsets[number + 1])
        weights = np.ones(stop - start, np.float32)
        if self.counted is not None:
            targets = self.counted[first + start + 1 : min(first + stop + 1, end)]
            weights[: len(targets)] = targets
        weights[max(end - 1 - first - start, 0) :] = 0
        return weights


class Summary(NamedTuple):
    """What `summary.json` says of the files beside it: written last, read first."""

    dtype: str
    documents: int
    tokens: int
    name_bytes: int
    key: str
    short: int
    longest: int


def write(
    folder: pathlib.Path, chunks: Iterable[list[encode.Encoded]], dtype: np.dtype, minimum: int, name: str
) -> Summary:
    """Writes the files of a part, document by document, without the documents of less than `minimum` tokens."""
    digest = hashlib.sha256()
    count = total = name_bytes = short = longest = 0
    with contextlib.ExitStack() as stack:
        tokens, offsets, names, name_offsets = (
            stack.enter_context(open(folder / file, "wb")) for file in ("tokens", "offsets", "names", "name_offsets")
        )
        progress = stack.enter_context(tqdm.tqdm(desc=f"tokenizing {name}", unit=" documents", delay=PROGRESS_AFTER))
        for ends in (offsets, name_offsets):
            ends.write(np.int64(0).tobytes())
        for chunk in chunks:
            for document in chunk:
                longest = max(longest, len(document.tokens))
                if len(document.tokens) < minimum:
                    short += 1
                    continue
                encoded_name = document.name.encode("utf-8", "surrogateescape")
                count, total, name_bytes = count + 1, total + len(document.tokens), name_bytes + len(encoded_name)
                written = document.tokens.astype(dtype).tobytes()
                digest.update(f"{len(encoded_name)} {len(written)} ".encode() + encoded_name + written)
                tokens.write(written)
                names.write(encoded_name)
                offsets.write(np.int64(total).tobytes())
                name_offsets.write(np.int64(name_bytes).tobytes())
            progress.update(len(chunk))
            seconds = max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{total / seconds:,.0f} tokens/s", refresh=False)
    summary = Summary(dtype.name, count, total, name_bytes, digest.hexdigest()[:16], short, longest)
    (folder / "summary.json").write_text(json.dumps(summary._asdict()))
    return summary


def read(folder: pathlib.Path, name: str) -> Stored:
    """Returns the part that `write` put into a folder, memory-mapped.

    Raises:
      DataError: its files are damaged.
    """
    try:
        summary = Summary(**json.loads((folder / "summary.json").read_text()))
        ends = summary.documents + 1

        def array(file: str, dtype: str, size: int) -> np.ndarray:
            if (folder / file).stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError
            return np.asarray(np.memmap(folder / file, dtype, "r", shape=(size,)))

        return Stored(
            source=name,
            tokens=array("tokens", summary.dtype, summary.tokens),
            offsets=array("offsets", "int64", ends),
            names=array("names", "uint8", summary.name_bytes),
            name_offsets=array("name_offsets", "int64", ends),
            key=summary.key,
            counted=None,
        )
    except (OSError, ValueError, TypeError):
        raise DataError(f"{folder} is damaged: delete it, it is made again from the documents") from None
