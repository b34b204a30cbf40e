"""Documents to rows: endless packed batches for training, one pass over every document for evaluation.

Training: the R rows of a batch are B packs of K rows; rows b*K to b*K + K - 1 are consecutive pieces of T tokens
of pack b's documents ("each batch row owns one document from its first token to its last", FoT, section 3.2). A pack
reads a document to its end and then takes another from the stream, by the ordinals of `mixture`: pack b takes b, b + B,
b + 2B, ... (`data.packing=strided`), so that no pack or host needs to know of another. The whole state is `Position`.

An epoch is what the stream makes it: n ordinals that stand for the n documents of a source once each. Every token of
these is in exactly one row. Packs read documents of different lengths, so some begin the next epoch while others are
still in this one: an epoch ends with the last of its documents, and its batches also hold first documents of the next.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fot.batch import Batch
from fot.config import EvaluateConfig, ExperimentConfig
from fot.data.corpus import Corpus
from fot.data.mixture import Mixture
from fot.errors import DataError

NOTHING_READ = -1  # the ordinal of a pack that hasn't taken a document yet


class Position(NamedTuple):
    """Where the next batch begins, the same on every host, and what came before it.

    Attributes:
      ordinals: for each of the B packs, the ordinal of its current document.
      offsets: for each pack, the tokens that it has read of that document.
      tokens: for each source, the tokens that all packs have read of it since the run began.
    """

    ordinals: tuple[int, ...]
    offsets: tuple[int, ...]
    tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, list[int]]:
        """Returns the position as plain values for JSON; `position_from_dict` is the inverse."""
        return {name: list(values) for name, values in self._asdict().items()}


def position_from_dict(values: Mapping[str, Sequence[int]]) -> Position:
    """Returns the position that `Position.to_dict` wrote.

    Raises:
      DataError: it isn't one.
    """
    try:
        position = Position(*(tuple(map(int, values[name])) for name in Position._fields))
    except (KeyError, TypeError, ValueError):
        position = Position((), (), ())
    ordinals, offsets, tokens = position
    sound = len(ordinals) == len(offsets) > 0 and len(tokens) > 0
    if not sound or min(ordinals) < NOTHING_READ or min(offsets + tokens) < 0:
        raise DataError(
            "saved data position needs 'ordinals' and 'offsets', equally long, and 'tokens': restore another checkpoint"
        )
    return position


def pack_count(config: ExperimentConfig) -> int:
    """Returns the number of packs of a batch, B."""
    return config.data.batch_size // config.crossbatch.packing


def start(config: ExperimentConfig) -> Position:
    """Returns the position of the first batch of a run."""
    packs = pack_count(config)
    return Position((NOTHING_READ,) * packs, (0,) * packs, (0,) * len(config.data.sources))


def _strided(ordinals: Sequence[int], pack: int) -> int:
    return pack if ordinals[pack] == NOTHING_READ else ordinals[pack] + len(ordinals)


def _released(ordinals: Sequence[int], pack: int) -> int:
    return max(ordinals) + 1


# The ordinal that a pack takes when it is done with the one it has, by the ordinals of all packs.
PACKINGS: dict[str, Callable[[Sequence[int], int], int]] = {"strided": _strided, "released": _released}


class _Span(NamedTuple):
    """Tokens `start` to `stop` of document `number`."""

    number: int
    start: int
    stop: int


class _Reading(NamedTuple):
    """What each pack reads for a batch, the span that begins the next one, and the position after it."""

    spans: list[list[_Span]]
    following: list[_Span]
    after: Position


def _read(stream: Mixture, position: Position, take: Callable[[Sequence[int], int], int], count: int) -> _Reading:
    """Lets each pack in turn read `count` tokens from its place in the stream on."""
    corpus = stream.corpus
    ordinals, offsets, tokens = map(list, position)
    packs, following = [], []
    for pack in range(len(ordinals)):
        if ordinals[pack] == NOTHING_READ:
            ordinals[pack] = take(ordinals, pack)
        spans, left = [], count
        number = stream.document_at(ordinals[pack])
        while left > 0:
            length, begin = corpus.length(number), offsets[pack]
            if begin >= length:
                raise DataError(
                    "saved data position is past the end of a document: restore with the documents it is from"
                )
            end = min(length, begin + left)
            spans.append(_Span(number, begin, end))
            tokens[corpus.source(number)] += end - begin
            left, offsets[pack] = left - (end - begin), end
            if end == length:
                ordinals[pack], offsets[pack] = take(ordinals, pack), 0
                number = stream.document_at(ordinals[pack])
        packs.append(spans)
        following.append(_Span(number, offsets[pack], offsets[pack] + 1))
    return _Reading(packs, following, Position(tuple(ordinals), tuple(offsets), tuple(tokens)))


def next_batch(
    stream: Mixture, position: Position, config: ExperimentConfig, packs: Sequence[int]
) -> tuple[Batch, Position]:
    """Returns the batch at `position` and the position after it; the cost doesn't depend on how far the run is.

    The rows keep `<eos>` and the `<bos>` after it: every token is an input once an epoch. The target at `<eos>` is
    that `<bos>`, with weight 0.

    `Batch.documents` numbers texts, not their occurrences. Two packs can hold the same text where documents are fewer
    than packs, or where an epoch ends; by its number neither is a negative for the other, and either sees of the
    other only what comes earlier in the text, which is what it has read itself. (The paper's negatives are other
    documents; a copy among them would teach the model to distrust its own past, or show it what comes next.)

    Args:
      packs: the packs to return, those of this host; `position` covers and advances all of them.

    Returns:
      Batch of numpy arrays [len(packs) * packing, context], and a Position.

    Raises:
      DataError: `position` belongs to another number of packs or sources, or to other documents.
    """
    total, rows, context = pack_count(config), config.crossbatch.packing, config.data.context
    if len(position.ordinals) != total:
        raise DataError(
            f"saved data position has {len(position.ordinals)} packs but data.batch_size={config.data.batch_size} / "
            f"crossbatch.packing={rows} makes {total}: restore with the values it was saved with"
        )
    if len(position.tokens) != len(stream.corpus.parts):
        raise DataError(
            f"saved data position has {len(position.tokens)} sources but data.task names {len(stream.corpus.parts)}: "
            "restore with those it was saved with"
        )
    reading = _read(stream, position, PACKINGS[config.data.packing], rows * context)
    fields = zip(*(_rows(stream.corpus, reading.spans[pack], reading.following[pack]) for pack in packs), strict=True)
    return Batch(*(np.concatenate(field).reshape(-1, context) for field in fields)), reading.after


def _rows(corpus: Corpus, spans: list[_Span], following: _Span) -> Batch:
    """Returns the tokens of spans as one long row, all fields [tokens]; `following` is the token after them."""
    tokens = np.concatenate([corpus.read(*span) for span in (*spans, following)])
    sizes = [span.stop - span.start for span in spans]
    return Batch(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=np.concatenate([corpus.weights(*span) for span in spans]),
        documents=np.repeat(np.array([span.number for span in spans], np.int32), sizes),
        positions=np.concatenate([np.arange(span.start, span.stop, dtype=np.int32) for span in spans]),
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
        rows[row].append(_Span(index, 0, inputs))
    return rows


def _padded(values: np.ndarray, context: int, fill: int) -> np.ndarray:
    return np.pad(values, (0, context - len(values)), constant_values=fill)


def _windows(corpus: Corpus, spans: list[_Span], context: int) -> Iterator[Batch]:
    """Yields the windows of one evaluation row, all fields [T]; every document starts a window."""
    for span in spans:
        for first in range(span.start, span.stop, context):
            size = min(context, span.stop - first)
            tokens = corpus.read(span.number, first, first + size + 1)
            yield Batch(
                _padded(tokens[:-1], context, 0),
                _padded(tokens[1:], context, 0),
                _padded(np.ones(size, np.float32), context, 0),
                _padded(np.full(size, span.number, np.int32), context, -1),
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
