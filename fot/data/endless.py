"""Endless documents of one length: made as they are read, each a pure function of its recipe and its number.

So a stream of them is resumed, or split over hosts, like one that is stored.
"""

import functools
from typing import NamedTuple, Protocol

import numpy as np

from fot.data import cache

FORMAT = "2"  # of the documents of a recipe
DOCUMENTS = 2**31 - 1  # of a split: as many as int32 can number
KEPT = 4096  # documents that are not made anew for each of their rows


class Made(NamedTuple):
    """A document.

    Attributes:
      tokens: int32 [tokens].
      counted: bool [tokens], whether a token is part of an answer, whose loss is taken.
    """

    tokens: np.ndarray
    counted: np.ndarray


class Recipe(Protocol):
    """How documents are made; hashable, and other documents have a recipe of another `repr`."""

    def make(self, number: int) -> Made:
        """Returns a document."""


class Endless(NamedTuple):
    """The documents of a split; a `fot.data.corpus.Part`.

    Attributes:
      source: name of the source.
      document: tokens of each document.
      recipe: how they are made.
    """

    source: str
    document: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """The same for the same documents."""
        return cache.key([FORMAT, repr(self)])

    @property
    def documents(self) -> int:
        """How many there are."""
        return DOCUMENTS

    @property
    def token_count(self) -> int:
        """Tokens of all documents together."""
        return DOCUMENTS * self.document

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.broadcast_to(np.int64(self.document), DOCUMENTS)

    def order(self, index: int, *key: int) -> int:
        """Returns the number of the index-th document: the index itself, as a curriculum goes by it."""
        return index

    def name(self, number: int) -> str:
        """Returns the name of a document."""
        return str(number)

    def length(self, number: int) -> int:
        """Returns the tokens of a document."""
        return self.document

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns the tokens `start` to `stop` of a document, int32 [stop - start]."""
        return made(self.recipe, number).tokens[start:stop]

    def weights(self, number: int, start: int, stop: int) -> np.ndarray:
        """Returns 1 where the next token belongs to an answer, float32."""
        counted = np.append(made(self.recipe, number).counted[1:], False)
        return counted[start:stop].astype(np.float32)


@functools.lru_cache(KEPT)
def made(recipe: Recipe, number: int) -> Made:
    """Returns a document, one that was made before if it is still there."""
    return recipe.make(number)
