"""Documents to rows: endless packed batches for training, one pass over every document for evaluation.

Training: the R rows of a batch are B packs of K rows; rows b*K to b*K + K - 1 are consecutive pieces of T tokens
of pack b's stream of documents ("each batch row owns one document from its first token to its last", FoT, section
3.2). Pack b takes the document ordinals b, b + B, b + 2B, ...; ordinal o is in epoch o // n the (o % n)-th of n
documents, in an order that depends on the seed and the epoch. So no pack or host needs to know of another, and
the whole state is `Position`.
"""

import functools
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fot.batch import Batch
from fot.config import EvaluateConfig, ExperimentConfig
from fot.data.corpus import Corpus
from fot.errors import DataError


class Position(NamedTuple):
    """Where the next batch begins: for each of the B packs, the same on every host.

    Attributes:
      finished: documents that the pack has read to their end.
      offsets: tokens read of the pack's current document.
    """

    finished: tuple[int, ...]
    offsets: tuple[int, ...]

    def to_dict(self) -> dict[str, list[int]]:
        """Returns the position as plain values for JSON; `position_from_dict` is the inverse."""
        return {"finished": list(self.finished), "offsets": list(self.offsets)}


def position_from_dict(values: Mapping[str, Sequence[int]]) -> Position:
    """Returns the position that `Position.to_dict` wrote.

    Raises:
      DataError: it isn't one.
    """
    try:
        finished, offsets = tuple(map(int, values["finished"])), tuple(map(int, values["offsets"]))
    except (KeyError, TypeError, ValueError):
        finished, offsets = (), ()
    if not finished or len(finished) != len(offsets) or min(finished + offsets) < 0:
        raise DataError("saved data position needs 'finished' and 'offsets', equally long: restore another checkpoint")
    return Position(finished, offsets)


def pack_count(config: ExperimentConfig) -> int:
    """Returns the number of packs of a batch, B."""
    return config.data.batch_size // config.crossbatch.packing


def start(config: ExperimentConfig) -> Position:
    """Returns the position of the first batch of a run."""
    zeros = (0,) * pack_count(config)
    return Position(zeros, zeros)


def document_at(ordinal: int, documents: int, seed: int) -> int:
    """Returns the index in a corpus of `documents` documents of the `ordinal`-th document of a run."""
    return int(_permutation(documents, seed, ordinal // documents)[ordinal % documents])


@functools.lru_cache(maxsize=4)  # packs read a few epochs at once; without, every document costs a permutation
def _permutation(documents: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(documents)


class _Span(NamedTuple):
    """Tokens `start` to `stop` of document `index`, which is the `ordinal`-th of the run."""

    ordinal: int
    index: int
    start: int
    stop: int


def _spans(
    corpus: Corpus, seed: int, packs: int, pack: int, finished: int, offset: int, count: int
) -> tuple[list[_Span], int, int]:
    """Returns the spans of the next `count` tokens of a pack, then its `finished` and `offset` after them."""
    spans = []
    while count > 0:
        ordinal = pack + packs * finished
        index = document_at(ordinal, len(corpus), seed)
        length = int(corpus.lengths[index])
        if offset >= length:
            raise DataError("saved data position is past the end of a document: restore with the documents it is from")
        stop = min(length, offset + count)
        spans.append(_Span(ordinal, index, offset, stop))
        count -= stop - offset
        finished, offset = (finished + 1, 0) if stop == length else (finished, stop)
    return spans, finished, offset


def next_batch(
    corpus: Corpus, position: Position, config: ExperimentConfig, packs: Sequence[int]
) -> tuple[Batch, Position]:
    """Returns the batch at `position` and the position after it; the cost doesn't depend on how far the run is.

    The stream keeps `<eos>` and the `<bos>` after it: every token is an input once an epoch. The target at `<eos>`
    is that `<bos>`, with weight 0.

    Args:
      packs: the packs to return, those of this host; `position` covers and advances all of them.

    Returns:
      Batch of numpy arrays [len(packs) * packing, context], and a Position.

    Raises:
      DataError: `position` belongs to another number of packs or to other documents.
    """
    total, rows, context = pack_count(config), config.crossbatch.packing, config.data.context
    if len(position.finished) != total:
        raise DataError(
            f"saved data position has {len(position.finished)} packs but data.batch_size={config.data.batch_size} / "
            f"crossbatch.packing={rows} makes {total}: restore with the values it was saved with"
        )
    read = [
        _spans(corpus, config.data.seed, total, pack, finished, offset, rows * context)
        for pack, (finished, offset) in enumerate(zip(*position, strict=True))
    ]
    after = Position(tuple(finished for _, finished, _ in read), tuple(offset for _, _, offset in read))
    streams = []
    for pack in packs:
        spans, finished, offset = read[pack]
        [following], _, _ = _spans(corpus, config.data.seed, total, pack, finished, offset, 1)
        streams.append(_stream(corpus, spans, following))
    arrays = (np.concatenate(field).reshape(-1, context) for field in zip(*streams, strict=True))
    return Batch(*arrays), after


def _stream(corpus: Corpus, spans: list[_Span], following: _Span) -> Batch:
    """Returns the tokens of spans as one long row, all fields [tokens]; `following` is the token after them."""
    tokens = np.concatenate([corpus.read(span.index, span.start, span.stop) for span in spans])
    after = corpus.read(following.index, following.start, following.stop)
    sizes = [span.stop - span.start for span in spans]
    positions = np.concatenate([np.arange(span.start, span.stop, dtype=np.int32) for span in spans])
    last = np.repeat([corpus.lengths[span.index] - 1 for span in spans], sizes)
    documents = np.repeat(np.array([span.ordinal for span in spans], np.int32), sizes)
    return Batch(
        tokens, np.concatenate([tokens[1:], after]), (positions < last).astype(np.float32), documents, positions
    )


def _assignment(corpus: Corpus, context: int, config: EvaluateConfig) -> list[list[_Span]]:
    """Returns the documents that each evaluation row reads, and how much of them: whoever is done takes the next."""
    rows = [[] for _ in range(config.batch_size)]
    free = [(0, row) for row in range(config.batch_size)]
    for index in range(min(len(corpus), config.max_documents or len(corpus))):
        inputs = int(corpus.lengths[index]) - 1
        inputs = min(inputs, config.max_tokens or inputs)
        windows, row = free[0]
        heapq.heapreplace(free, (windows + -(-inputs // context), row))
        rows[row].append(_Span(index, index, 0, inputs))
    return rows


def _padded(values: np.ndarray, context: int, fill: int) -> np.ndarray:
    return np.pad(values, (0, context - len(values)), constant_values=fill)


def _windows(corpus: Corpus, spans: list[_Span], context: int) -> Iterator[Batch]:
    """Yields the windows of one evaluation row, all fields [T]; every document starts a window."""
    for span in spans:
        for first in range(span.start, span.stop, context):
            size = min(context, span.stop - first)
            tokens = corpus.read(span.index, first, first + size + 1)
            yield Batch(
                _padded(tokens[:-1], context, 0),
                _padded(tokens[1:], context, 0),
                _padded(np.ones(size, np.float32), context, 0),
                _padded(np.full(size, span.ordinal, np.int32), context, -1),
                _padded(np.arange(first, first + size, dtype=np.int32), context, 0),
            )


def evaluation_batches(corpus: Corpus, context: int, config: EvaluateConfig) -> Iterator[Batch]:
    """Yields every document once, `config.batch_size` documents side by side, in windows of `context` tokens.

    A row reads one document to its end and then takes the next unread one. A document starts at the start of a
    window and what is left of its last window has no tokens, so what a document gives doesn't depend on the others.
    A document of n tokens gives its n - 1 pairs of token and target (at most `config.max_tokens`): the closing
    `<eos>` is a target and never an input.

    Yields:
      Batch of numpy arrays [config.batch_size, context]; `documents` is the index in the corpus. A row that changes
      document does so between two batches; one without documents left is -1 throughout.
    """
    blank = Batch(
        *(np.zeros(context, dtype) for dtype in (np.int32, np.int32, np.float32)),
        np.full(context, -1, np.int32),
        np.zeros(context, np.int32),
    )
    rows = [_windows(corpus, spans, context) for spans in _assignment(corpus, context, config)]
    for windows in itertools.zip_longest(*rows, fillvalue=blank):
        yield Batch(*(np.stack(field) for field in zip(*windows, strict=True)))


def evaluation_batch_count(corpus: Corpus, context: int, config: EvaluateConfig) -> int:
    """Returns how many batches `evaluation_batches` yields, without reading a token."""
    return max(sum(-(-span.stop // context) for span in spans) for spans in _assignment(corpus, context, config))
