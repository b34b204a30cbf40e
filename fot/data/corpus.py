"""Corpora: the documents of a split, source by source: tokenized ones from the cache, or made as they are read."""

import bisect
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, final

import numpy as np

from fot.config import ExperimentConfig, SourceConfig
from fot.data import cache, dictionary, encode, passkey, stored, tasks, tokenizer
from fot.data.stored import Stored
from fot.errors import DataError


class Part(Protocol):
    """The documents of one source, stored or made as they are read; numbered from 0.

    Attributes:
      source: name of the source.
      key: the same for the same names and tokens in the same order.
    """

    source: str
    key: str

    @property
    def documents(self) -> int:
        """How many there are."""

    @property
    def token_count(self) -> int:
        """Tokens of all documents together."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""

    def order(self, index: int, *key: int) -> int:
        """Returns the number of the index-th document that a stream takes; it goes on from epoch to epoch."""

    def name(self, number: int) -> str:
        """Returns the name of a document."""

    def length(self, number: int) -> int:
        """Returns the tokens of a document."""

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` to `stop` of a document, int32 [stop - start]."""

    def weights(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns, for the same tokens, 1 where the document has a next one and that counts, float32."""


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of all sources, numbered through: those of the first source, then those of the second, ..."""

    parts: tuple[Part, ...]

    @functools.cached_property
    def firsts(self) -> list[int]:
        """The number of the first document of each part, and the number of all documents."""
        return [0, *itertools.accumulate(part.documents for part in self.parts)]

    @functools.cached_property
    def key(self) -> str:
        """The same for the same names, tokens and order, wherever the files lie; a `rows.Position` belongs to it."""
        return cache.key(part.key for part in self.parts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, bos and eos included, int64 [documents]."""
        first, *rest = (part.lengths for part in self.parts)
        return np.concatenate([first, *rest]) if rest else first

    @property
    def token_count(self) -> int:
        """Tokens of all documents together."""
        return sum(part.token_count for part in self.parts)

    def __len__(self) -> int:
        return self.firsts[-1]

    def source(self, number: int) -> int:
        """Returns which part a document belongs to."""
        return bisect.bisect_right(self.firsts, number) - 1

    def name(self, number: int) -> str:
        """Returns the name of a document."""
        part, index = self._place(number)
        return part.name(index)

    def length(self, number: int) -> int:
        """Returns the tokens of a document, bos and eos included."""
        part, index = self._place(number)
        return part.length(index)

    def document(self, number: int) -> np.ndarray:
        """Returns the tokens of a document, int32 [lengths[number]]."""
        return self.read(number, 0, self.length(number))

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` to `stop` of a document, int32 [stop - start]."""
        part, index = self._place(number)
        return part.read(index, start, stop)

    def weights(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns, for the same tokens, 1 where the document has a next one and that counts, float32."""
        part, index = self._place(number)
        return part.weights(index, start, stop)

    def _place(self, number: int) -> tuple[Part, int]:
        source = self.source(number)
        return self.parts[source], number - self.firsts[source]


class Data(NamedTuple):
    """A split ready for use, with the tokenizer that made it."""

    tokenizer: tokenizer.Tokenizer
    corpus: Corpus


class Generated(NamedTuple):
    """Documents that are made as they are read, and their own vocabulary."""

    tokenizer: Callable[[ExperimentConfig], tokenizer.Tokenizer]
    endless: Callable[[ExperimentConfig, str], Part]


GENERATED = {
    "dictionary": Generated(lambda config: dictionary.tokenizer(config.dictionary), dictionary.endless),
    "passkey": Generated(passkey.tokenizer, passkey.endless),
}


def load_tokenizer(config: ExperimentConfig) -> tokenizer.Tokenizer:
    """Returns the tokenizer of a run, of whatever task; see `tokenizer.load`."""
    made = GENERATED.get(config.data.sources[0].task)
    return tokenizer.load(config.data, config.model) if made is None else made.tokenizer(config)


def load(config: ExperimentConfig, split: str) -> Data:
    """Returns the tokenizer of a run and the tokenized documents of one split ("train" or "held_out").

    What the cache has is found without reading a document; the rest is tokenized, by `data.workers` processes.
    Generated documents are made as they are read.

    Raises:
      DataError: see `tasks.documents` and `tokenizer.load`; or no document of a source has `min_document_tokens`
        tokens, or a file of the cache is damaged.
      UserError: the cache can't be written.
    """
    sources, encoder = config.data.sources, load_tokenizer(config)
    if sources[0].task in GENERATED:
        return Data(encoder, Corpus((GENERATED[sources[0].task].endless(config, split),)))
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
    part = Stored("arrays", tokens, offsets, np.frombuffer(b"".join(names), np.uint8), name_offsets, key, mask)
    return Corpus((part,))


def _load_part(
    config: ExperimentConfig, source: SourceConfig, name: str, split: str, encoder: tokenizer.Tokenizer
) -> Stored:
    """Returns the documents of one source from the cache, where they are put first if need be."""
    data = config.data
    origin = [stored.FORMAT, encoder.key, tasks.fingerprint(source, data), split]
    settings = [str(data.held_out_fraction), str(source.min_document_tokens), data.bad_documents]
    folder = cache.folder(data) / f"corpus-{cache.key(origin + settings)}"
    if not folder.exists():
        documents = encode.encoded(tasks.documents(source, data, split), encoder, config)
        dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.int32
        with cache.new_folder(folder) as new, contextlib.closing(documents):
            summary = stored.write(new, documents, np.dtype(dtype), source.min_document_tokens, f"{name} ({split})")
            if summary.documents == 0:
                raise DataError(
                    f"none of {summary.short} documents of data.task={source.task} {source.files} has "
                    f"data.min_document_tokens={source.min_document_tokens} tokens, the longest has "
                    f"{summary.longest}: lower data.min_document_tokens or add documents"
                )
    return stored.read(folder, name)
