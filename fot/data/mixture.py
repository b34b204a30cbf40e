"""Mixtures: the endless stream of documents that a run reads, and which document is where in it.

The documents of a stream are numbered by ordinals, 0, 1, 2, ... Which document an ordinal stands for is computed from
it alone, at the same cost everywhere and without a list of anything, so a position in the stream is a number.
"""

import dataclasses
import itertools
from typing import NamedTuple, final

from fot.config import DataConfig
from fot.data import permutation
from fot.data.corpus import Corpus
from fot.errors import DataError

BLOCK = 1024  # ordinals in which each source has its share, rounded to whole documents
SHARE_BITS = 32  # shares are multiples of 2**-32, so that they add up exactly


class Place(NamedTuple):
    """The `index`-th document that the stream takes from a source; goes on counting from epoch to epoch."""

    source: int
    index: int


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """A stream of documents: the sources of a corpus by their shares, each in a new order in each of its epochs.

    A block of ordinals holds each source's share of documents in random order. Where shares don't make whole numbers,
    the numbers vary by a document or two from block to block, such that no error adds up. A single source is the
    stream itself: ordinal o is in epoch o // n the (o % n)-th of n documents.

    Attributes:
      corpus: the documents.
      seed: of all orders.
      edges: shares of documents in units of 2**-32, added up: source s has those from edges[s] to edges[s + 1].
      block: ordinals in a block.
    """

    corpus: Corpus
    seed: int
    edges: tuple[int, ...]
    block: int

    def place(self, ordinal: int) -> Place:
        """Returns the source that an ordinal belongs to, and how many documents of that source come before."""
        if len(self.edges) == 2:
            return Place(0, ordinal)
        block, slot = divmod(ordinal, self.block)
        slot = permutation.shuffled(slot, self.block, self.seed, "block", block)
        before = [edge * self.block * block >> SHARE_BITS for edge in self.edges]
        after = [edge * self.block * (block + 1) >> SHARE_BITS for edge in self.edges]
        starts = [b - a for a, b in zip(before, after, strict=True)]  # of each source's slots
        source = next(s for s in range(len(starts) - 1) if slot < starts[s + 1])
        return Place(source, before[source + 1] - before[source] + slot - starts[source])

    def document_at(self, ordinal: int) -> int:
        """Returns the number in the corpus of the document that an ordinal stands for."""
        source, index = self.place(ordinal)
        return self.corpus.firsts[source] + self.corpus.parts[source].order(index, self.seed, source)


def mix(corpus: Corpus, config: DataConfig) -> Mixture:
    """Returns the stream of a corpus by `data.weights` and `data.weight_unit`.

    Shares of tokens become shares of documents by the mean length of each source's documents.

    Raises:
      DataError: a source's share of the documents is below 2**-32.
    """
    if len(corpus.parts) == 1:
        return Mixture(corpus, config.seed, (0, 1 << SHARE_BITS), BLOCK)
    shares = [source.weight for source in config.sources]
    if config.weight_unit == "tokens":
        means = [part.token_count / part.documents for part in corpus.parts]
        shares = [share / mean for share, mean in zip(shares, means, strict=True)]
    total = sum(shares)
    inner = [round(edge / total * 2**SHARE_BITS) for edge in itertools.accumulate(shares[:-1])]
    edges = (0, *inner, 1 << SHARE_BITS)
    smallest = min(b - a for a, b in itertools.pairwise(edges))
    if smallest <= 0:
        raise DataError(f"data.weights={config.weights}: one is too small beside the others: raise it or leave it out")
    # Every block has a document of each source, or rounding could give one less than none.
    return Mixture(corpus, config.seed, edges, max(BLOCK, -(-(1 << SHARE_BITS) // smallest)))
