"""Corpora: the tokenized documents of a split, source by source, memory-mapped from the cache.

On disk the tokens of a source are one plain array, and no format of records: a row then reads the slice of a document
that it needs, from anywhere, and nothing else.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

import numpy as np
import tqdm

from fot.config import ExperimentConfig, SourceConfig
from fot.data import cache, encode, tasks, tokenizer
from fot.errors import DataError

FORMAT = "1"  # of the files in the cache
PROGRESS_AFTER = 2  # seconds


class Part(NamedTuple):
    """The documents of one source, each `<bos> tokens <eos>`.

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


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of all sources, numbered through: those of the first source, then those of the second, ..."""

    parts: tuple[Part, ...]

    @functools.cached_property
    def firsts(self) -> list[int]:
        """The number of the first document of each part, and the number of all documents."""
        return [0, *itertools.accumulate(len(part.offsets) - 1 for part in self.parts)]

    @functools.cached_property
    def key(self) -> str:
        """The same for the same names, tokens and order, wherever the files lie; a `rows.Position` belongs to it."""
        return cache.key(part.key for part in self.parts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, bos and eos included, int64 [documents]."""
        return np.concatenate([np.diff(part.offsets) for part in self.parts])

    @property
    def token_count(self) -> int:
        """Tokens of all documents together."""
        return sum(len(part.tokens) for part in self.parts)

    def __len__(self) -> int:
        return self.firsts[-1]

    def source(self, number: int) -> int:
        """Returns which part a document belongs to."""
        return bisect.bisect_right(self.firsts, number) - 1

    def name(self, number: int) -> str:
        """Returns the name of a document."""
        part, index = self._place(number)
        first, last = part.name_offsets[index : index + 2]
        return part.names[first:last].tobytes().decode("utf-8", "surrogateescape")

    def length(self, number: int) -> int:
        """Returns the tokens of a document, bos and eos included."""
        part, index = self._place(number)
        return int(part.offsets[index + 1]) - int(part.offsets[index])

    def document(self, number: int) -> np.ndarray:
        """Returns the tokens of a document, int32 [lengths[number]]."""
        return self.read(number, 0, self.length(number))

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` to `stop` of a document, int32 [stop - start]; touches no other token."""
        part, index = self._place(number)
        first = int(part.offsets[index])
        return part.tokens[first + start : first + stop].astype(np.int32)

    def weights(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns, for the same tokens, 1 where the document has a next one and that counts, float32."""
        part, index = self._place(number)
        first, end = int(part.offsets[index]), int(part.offsets[index + 1])
        weights = np.ones(stop - start, np.float32)
        if part.counted is not None:
            targets = part.counted[first + start + 1 : min(first + stop + 1, end)]
            weights[: len(targets)] = targets
        weights[max(end - 1 - first - start, 0) :] = 0
        return weights

    def _place(self, number: int) -> tuple[Part, int]:
        source = self.source(number)
        return self.parts[source], number - self.firsts[source]


class Data(NamedTuple):
    """A split ready for use, with the tokenizer that made it."""

    tokenizer: tokenizer.Tokenizer
    corpus: Corpus


def load(config: ExperimentConfig, split: str) -> Data:
    """Returns the tokenizer of a run and the tokenized documents of one split ("train" or "held_out").

    What the cache has is found without reading a document; the rest is tokenized, by `data.workers` processes.

    Raises:
      DataError: see `tasks.documents` and `tokenizer.load`; or no document of a source has `min_document_tokens`
        tokens, or a file of the cache is damaged.
      UserError: the cache can't be written.
    """
    encoder = tokenizer.load(config.data, config.model)
    sources = config.data.sources
    named = zip(sources, source_names(sources), strict=True)
    return Data(encoder, Corpus(tuple(_load_part(config, source, name, split, encoder) for source, name in named)))


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """Returns a name for each source: its task, with its number where several have the same task."""
    all_tasks = [source.task for source in sources]
    return [task if all_tasks.count(task) == 1 else f"{task}_{i}" for i, task in enumerate(all_tasks)]


def from_arrays(documents: Sequence[np.ndarray], counted: Sequence[np.ndarray] | None = None) -> Corpus:
    """Returns a corpus of one source from arrays in memory (synthetic data, tests).

    Args:
      documents: token arrays, bos and eos already in them.
      counted: for each document, which of its tokens count as targets; None: all.
    """
    tokens = np.concatenate(documents, dtype=np.int32, casting="unsafe")
    offsets = np.cumsum([0] + [len(document) for document in documents], dtype=np.int64)
    mask = None if counted is None else np.concatenate(counted).astype(bool)
    names = [str(number).encode() for number in range(len(documents))]
    name_offsets = np.cumsum([0] + [len(name) for name in names], dtype=np.int64)
    key = cache.key([tokens.tobytes(), offsets.tobytes(), b"" if mask is None else mask.tobytes()])
    part = Part("arrays", tokens, offsets, np.frombuffer(b"".join(names), np.uint8), name_offsets, key, mask)
    return Corpus((part,))


def _load_part(
    config: ExperimentConfig, source: SourceConfig, name: str, split: str, encoder: tokenizer.Tokenizer
) -> Part:
    """Returns the documents of one source from the cache, where they are put first if need be."""
    data = config.data
    origin = [FORMAT, encoder.key, tasks.fingerprint(source, data), split]
    settings = [str(data.held_out_fraction), str(source.min_document_tokens), data.bad_documents]
    folder = cache.folder(data) / f"corpus-{cache.key(origin + settings)}"
    if not folder.exists():
        documents = encode.encoded(tasks.documents(source, data, split), encoder, config)
        dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.int32
        with cache.new_folder(folder) as new, contextlib.closing(documents):
            summary = _write(new, documents, np.dtype(dtype), source.min_document_tokens, f"{name} ({split})")
            if summary.documents == 0:
                raise DataError(
                    f"none of {summary.short} documents of data.task={source.task} {source.files} has "
                    f"data.min_document_tokens={source.min_document_tokens} tokens, the longest has "
                    f"{summary.longest}: lower data.min_document_tokens or add documents"
                )
    return _open(folder, name)


class _Summary(NamedTuple):
    """What `summary.json` says of the files beside it: written last, read first."""

    dtype: str
    documents: int
    tokens: int
    name_bytes: int
    key: str
    short: int
    longest: int


def _write(
    folder: pathlib.Path, chunks: Iterable[list[encode.Encoded]], dtype: np.dtype, minimum: int, name: str
) -> _Summary:
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
    summary = _Summary(dtype.name, count, total, name_bytes, digest.hexdigest()[:16], short, longest)
    (folder / "summary.json").write_text(json.dumps(summary._asdict()))
    return summary


def _open(folder: pathlib.Path, name: str) -> Part:
    try:
        summary = _Summary(**json.loads((folder / "summary.json").read_text()))
        ends = summary.documents + 1

        def array(file: str, dtype: str, size: int) -> np.ndarray:
            if (folder / file).stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError
            return np.asarray(np.memmap(folder / file, dtype, "r", shape=(size,)))

        return Part(
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
