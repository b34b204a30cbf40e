"""Corpora: the tokenized documents of a split, memory-mapped from the cache."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import tqdm

from fot.config import DataConfig, ExperimentConfig
from fot.data import cache, tasks, tokenizer
from fot.errors import DataError

TOKENIZED_AT_ONCE = 64  # documents between two updates of the progress bar
PROGRESS_AFTER = 2  # seconds


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized documents, each `<bos> tokens <eos>`.

    Attributes:
      tokens: all documents one after the other, uint16 or int32 [total].
      starts: index in `tokens` of each document's bos, int64 [documents].
      lengths: tokens of each document, bos and eos included, int64 [documents].
      names: name of each document.
      key: the same for the same documents, tokens and order; a saved `rows.Position` holds only for this key.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    names: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of a document, int32 [lengths[index]]."""
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` to `stop` of a document, int32 [stop - start]; touches no other token."""
        first = self.starts[index]
        return self.tokens[first + start : first + stop].astype(np.int32)


class Data(NamedTuple):
    """A split ready for use, with the tokenizer that made it."""

    tokenizer: tokenizer.Tokenizer
    corpus: Corpus


def load(config: ExperimentConfig, split: str) -> Data:
    """Returns the tokenizer of a run and the tokenized documents of one split ("train" or "held_out").

    Raises:
      DataError: see `tasks.documents`, `tokenizer.load` and `tokenize`.
    """
    encoder = tokenizer.load(config.data, config.model)
    [source] = config.data.sources  # mixtures come with the next change
    documents = list(tasks.documents(source, config.data, split))
    return Data(encoder, tokenize(config.data, documents, encoder))


def tokenize(config: DataConfig, documents: Sequence[tasks.Document], encoder: tokenizer.Tokenizer) -> Corpus:
    """Tokenizes documents, or finds their tokens in the cache; short documents are left out.

    Raises:
      DataError: no document has `min_document_tokens` tokens, or a file of the cache is damaged.
    """
    key = cache.key([encoder.key, *(part for document in documents for part in document)])
    tokens_path = cache.folder(config) / f"corpus-{key}.tokens.npy"
    offsets_path = cache.folder(config) / f"corpus-{key}.offsets.npy"
    if not offsets_path.exists() or not tokens_path.exists():
        pieces = _encode([document.text for document in documents], encoder)
        dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.int32
        tokens = np.concatenate(pieces, dtype=dtype, casting="unsafe")
        offsets = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
        cache.write(tokens_path, lambda file: np.save(file, tokens))
        cache.write(offsets_path, lambda file: np.save(file, offsets))
    offsets = np.asarray(_open(offsets_path))
    return _select(
        _open(tokens_path),
        offsets,
        [document.name for document in documents],
        key,
        config.sources[0].min_document_tokens,
    )


def from_arrays(documents: Sequence[np.ndarray]) -> Corpus:
    """Returns a corpus of token arrays held in memory, bos and eos already in them (synthetic data, tests)."""
    tokens = np.concatenate(documents, dtype=np.int32, casting="unsafe")
    offsets = np.cumsum([0] + [len(document) for document in documents], dtype=np.int64)
    key = cache.key([tokens.tobytes(), offsets.tobytes()])
    return Corpus(tokens, offsets[:-1], np.diff(offsets), tuple(str(i) for i in range(len(documents))), key)


def _select(tokens: np.ndarray, offsets: np.ndarray, names: list[str], key: str, minimum: int) -> Corpus:
    """Returns the corpus of the documents of at least `minimum` tokens."""
    lengths = np.diff(offsets)
    kept = np.flatnonzero(lengths >= minimum)
    if len(kept) == 0:
        raise DataError(
            f"none of {len(lengths)} documents has data.min_document_tokens={minimum} tokens, the longest has "
            f"{lengths.max()}: lower data.min_document_tokens or add documents"
        )
    names_kept = tuple(names[i] for i in kept)
    return Corpus(tokens, offsets[:-1][kept], lengths[kept], names_kept, cache.key([key, str(minimum)]))


def _encode(texts: list[str], encoder: tokenizer.Tokenizer) -> list[np.ndarray]:
    """Returns `<bos> tokens <eos>` of every text, int32."""
    pieces = []
    with tqdm.tqdm(total=len(texts), desc="tokenizing", unit=" documents", delay=PROGRESS_AFTER) as progress:
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            for ids in encoder.encode_batch(texts[start : start + TOKENIZED_AT_ONCE]):
                pieces.append(np.concatenate([[encoder.bos], ids, [encoder.eos]], dtype=np.int32))
                progress.update()
    return pieces


def _open(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise DataError(f"{path} is damaged: delete it, it is made again from the documents") from None
