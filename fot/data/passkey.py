"""Passkey retrieval: a number inside filler, and a question for it at the end (FoT, section 5).

One text serves all: prompts of any length for the tokenizer of any model, and endless documents to train a small one
on, with a vocabulary of their own. A document is a pure function of the config's seed and its number, so a stream of
them is resumed, or split over hosts, like one that is stored.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fot.config import ExperimentConfig, PasskeyConfig
from fot.data import tasks
from fot.data.endless import Endless, Made
from fot.data.tokenizer import Tokenizer
from fot.errors import ConfigError, DataError

FORMAT = "1"  # of the vocabulary

# The words of Mohtashami and Jaggi ("Landmark Attention", 2023), which the paper takes over.
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}."

PAD, BOS, EOS = range(3)
MARK_NAMES = ("<pad>", "<bos>", "<eos>")
_PIECE = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)  # words with the space before them; a digit is a piece

# What random numbers are for comes first in their seed, so that none are drawn twice.
_DOCUMENT, _KEYS = range(2)


class Prompt(NamedTuple):
    """A question for a pass key.

    Attributes:
      tokens: int32 [tokens], bos included.
      key: the digits that answer it.
    """

    tokens: np.ndarray
    key: str


def text(key: str, sentences: int, before: int) -> str:
    """Returns the whole prompt with so many sentences of filler, `before` of them before the key."""
    parts = (TASK, _filler(before), KEY.format(key=key), _filler(sentences - before), QUESTION)
    return "\n".join(part for part in parts if part)


def prompt(tokenizer: Tokenizer, key: str, length: int, depth: float) -> Prompt:
    """Returns the longest prompt of whole sentences that has at most `length` tokens, bos included.

    Args:
      tokenizer: any.
      key: the digits to be found.
      length: in tokens.
      depth: share of the filler that comes before the key, from 0 to 1.

    Raises:
      ConfigError: without filler it is longer already.
    """
    made = functools.partial(_prompt_tokens, tokenizer, key, depth=depth)
    # Tokens of a text need not be those of its parts: take what is left in rounds of the filler, then sentences.
    count, tokens = 0, made(0)
    _check_room(len(tokens), length)
    cycle = len(made(len(FILLER))) - len(tokens)
    while rounds := int((length - len(tokens)) / cycle):
        count = max(count + rounds * len(FILLER), 0)
        tokens = made(count)
    while len(tokens) > length:
        count -= 1
        tokens = made(count)
    while len(more := made(count + 1)) <= length:
        count, tokens = count + 1, more
    return Prompt(tokens, key)


def check_length(tokenizer: Tokenizer, digits: int, length: int) -> None:
    """Raises ConfigError if a prompt of so many tokens has no room for its words, a key of so many digits, and bos."""
    _check_room(len(_prompt_tokens(tokenizer, "0" * digits, 0, 0.0)), length)


def _check_room(least: int, length: int) -> None:
    if least > length:
        raise ConfigError(f"a passkey prompt of {length} tokens has no room for filler: ask for {least} or more")


def _prompt_tokens(tokenizer: Tokenizer, key: str, sentences: int, depth: float) -> np.ndarray:
    words = text(key, sentences, round(depth * sentences))
    return np.concatenate([[tokenizer.bos], tokenizer.encode(words)]).astype(np.int32)


def keys(count: int, digits: int, *seed: int) -> list[str]:
    """Returns random keys, none of which begins with 0; the same ones for the same seed."""
    random = np.random.default_rng((_KEYS, *seed))
    return [_key(digits, random) for _ in range(count)]


def answered(answer: str, key: str) -> bool:
    """Tells whether a continuation of the prompt begins with the key, and with no digit more."""
    found = re.match(r"\s*(\d+)", answer, re.ASCII)
    return found is not None and found[1] == key


class Recipe(NamedTuple):
    """How the documents of a split are made, see `fot.data.endless`.

    Attributes:
      config: of the documents.
      context: tokens of a row; question and answer are in the last row of a document.
      seed: of the documents.
      split: number of the split.
      firsts: the number of the first document of each phase of the curriculum.
    """

    config: PasskeyConfig
    context: int
    seed: int
    split: int
    firsts: tuple[int, ...]

    def make(self, number: int) -> Made:
        """Returns a document: <bos> text <eos>, with <pad> around it so that question and answer are in the last row.

        Where they are there, and how long the text is, is random, as is the place of the key. A document without a
        key is filler and nothing to answer.
        """
        config = self.config
        random = np.random.default_rng((_DOCUMENT, self.seed, self.split, number))
        phase = sum(number >= first for first in self.firsts) - 1
        sentences = int(random.integers(_room(config, config.tokens[phase]) + 1))
        key, before = _key(config.digits, random), int(random.integers(sentences + 1))
        words, answer = text(key, sentences, before), _encode(ANSWER.format(key=key))
        if number % config.documents_per_key[phase]:
            words, answer = f"{TASK}\n{_filler(_room(config, config.tokens[phase]))}", answer[:0]
        inside = np.concatenate([[BOS], _encode(words), answer, [EOS]])
        left = config.document - len(inside)
        after = int(random.integers(min(left, self.context - _tail(config.digits)) + 1))
        tokens, counted = np.full(config.document, PAD, np.int32), np.zeros(config.document, bool)
        tokens[left - after : config.document - after] = inside
        end = config.document - after - 1
        counted[end - len(answer) : end] = True
        return Made(tokens, counted)


def endless(config: ExperimentConfig, split: str) -> Endless:
    """Returns the documents of a split: of training, those of its curriculum; held out, of the task as it ends.

    Raises:
      ConfigError: a text without filler has no room, or the question with its answer in a row.
    """
    passkey, packs = config.passkey, config.data.batch_size // config.crossbatch.packing
    firsts = (0, *(step * packs for step in passkey.phase_steps))
    if split == "held_out":
        last = dict(tokens=passkey.tokens[-1:], documents_per_key=passkey.documents_per_key[-1:], phase_steps=())
        passkey, firsts = dataclasses.replace(passkey, **last), (0,)
    key = "0" * passkey.digits
    least, question = len(_encode(text(key, 0, 0) + ANSWER.format(key=key))) + 2, _tail(passkey.digits)
    for tokens in passkey.tokens:
        if tokens < least:
            raise ConfigError(f"passkey.tokens={passkey.tokens}: a text has {least} tokens without filler, raise it")
    if question > config.data.context:
        raise ConfigError(f"data.context={config.data.context} can't hold the question and its answer: raise it")
    recipe = Recipe(passkey, config.data.context, config.data.seed, tasks.SPLITS.index(split), firsts)
    return Endless("passkey", passkey.document, recipe)


def tokenizer(config: ExperimentConfig) -> Tokenizer:
    """Returns the vocabulary of the documents as a tokenizer: their words, punctuation marks and digits.

    Raises:
      DataError: `model.vocab_size` is too small for it.
    """
    size = len(_vocabulary())
    if size > config.model.vocab_size:
        raise DataError(
            f"data.task=passkey has {size} pieces but model.vocab_size={config.model.vocab_size}: set "
            f"model.vocab_size to {size} or more"
        )

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        return [_encode(each) for each in texts]

    def decode(tokens: Iterable[int]) -> str:
        names = list(_vocabulary())
        return "".join(names[token] for token in tokens if len(MARK_NAMES) <= token < size)

    return Tokenizer(encode_batch, decode, size, BOS, EOS, f"passkey-{FORMAT}")


@functools.cache
def _vocabulary() -> dict[str, int]:
    """Returns the number of each piece: marks, digits, then what all texts have, as it comes."""
    words = text("", len(FILLER) + 1, len(FILLER) + 1) + ANSWER
    pieces = dict.fromkeys([*MARK_NAMES, *"0123456789", " ", *_PIECE.findall(words.replace("{key}", ""))])
    return {piece: number for number, piece in enumerate(pieces)}


def _encode(words: str) -> np.ndarray:
    vocabulary = _vocabulary()
    try:
        return np.array([vocabulary[piece] for piece in _PIECE.findall(words)], np.int32)
    except KeyError as error:
        raise DataError(f"{error.args[0]!r} is no token of the passkey task: use the words of its texts") from None


def _filler(sentences: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(FILLER), sentences))


def _key(digits: int, random: np.random.Generator) -> str:
    return str(random.integers(10 ** (digits - 1), 10**digits))


def _tail(digits: int) -> int:
    """Returns the tokens of a question with its answer and eos."""
    return len(_encode(QUESTION + ANSWER.format(key="0" * digits))) + 1


@functools.lru_cache(64)
def _room(config: PasskeyConfig, tokens: int) -> int:
    """Returns how many sentences of filler a document of so many tokens has room for, wherever its key is."""
    key = "0" * config.digits
    each = max(len(_encode(" " + sentence)) for sentence in FILLER)
    spare = 2  # two fillers have two line ends
    return max(tokens - len(_encode(text(key, 0, 0) + ANSWER.format(key=key))) - 2 - spare, 0) // each
