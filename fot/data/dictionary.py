"""Dictionary lookup: endless documents that define records and then ask for them (FoT, Appendix D).

A document is a pure function of the config's seed and its number, so a stream of them is resumed, or split over hosts,
like one that is stored. Its keys are all different; so are those of a dictionary of any size.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fot.config import DICTIONARY_MARKS, DictionaryConfig, ExperimentConfig
from fot.data import permutation, tasks
from fot.data.endless import Endless, Made
from fot.data.tokenizer import Tokenizer
from fot.errors import DataError

PAD, KEY, VALUE, QUERY = range(DICTIONARY_MARKS)
MARK_NAMES = ("<pad>", "<k>", "<v>", "<q>")

# What random numbers are for comes first in their seed, so that none are drawn twice.
_DOCUMENT, _NEIGHBOURS, _WINDOW, _QUESTIONS = range(4)


class Records(NamedTuple):
    """Records of a dictionary, all keys different.

    Attributes:
      keys: symbols from 0, int32 [records, key_tokens].
      values: symbols from 0, int32 [records, value_tokens].
    """

    keys: np.ndarray
    values: np.ndarray

    def take(self, index: Sequence[int] | np.ndarray) -> "Records":
        """Returns the records at `index`."""
        return Records(self.keys[index], self.values[index])


class Recipe(NamedTuple):
    """How the documents of a split are made, see `fot.data.endless`.

    Attributes:
      config: of the documents.
      seed: of the documents.
      split: number of the split.
      phases: the number of the first document of each phase of `config.records` but the first.
    """

    config: DictionaryConfig
    seed: int
    split: int
    phases: tuple[int, ...]

    def make(self, number: int) -> Made:
        """Returns a document of `config.document` tokens."""
        config = self.config
        random = np.random.default_rng((_DOCUMENT, self.seed, self.split, number))
        asked = config.window_records
        room = asked * (config.document // config.window - 1)
        phase = sum(number >= first for first in self.phases)
        count = config.records[phase] or room
        records = _with_values(_keys(self, number, count, random), config, random)
        defined, queried = FILLS[config.fill](count, room, random), FILLS[config.fill](count, asked, random)
        tokens = np.zeros((config.document // config.window, config.window), np.int32)
        defining = definitions(records.take(defined), config)
        tokens[: len(defining)] = defining
        tokens[-1:] = questions(records.take(queried), config)
        return Made(tokens.ravel(), answers(tokens.ravel(), config))


class Dictionary(NamedTuple):
    """One dictionary of windows of definitions, as many as there are keys for, each made when it is asked for.

    Attributes:
      config: of the records; all their keys are different.
      seed: of keys, values and questions.
    """

    config: DictionaryConfig
    seed: int

    @property
    def windows(self) -> int:
        """How many windows of definitions there are keys for."""
        return self.config.symbols**self.config.key_tokens // self.config.window_records

    def definitions(self, window: int) -> np.ndarray:
        """Returns the token ids of a window of definitions, int32 [config.window]."""
        return definitions(self._records(window), self.config)[0]

    def questions(self, windows: int, number: int) -> np.ndarray:
        """Returns token ids that ask for records of the first windows, each at most once, int32 [config.window].

        Args:
          windows: how many windows of definitions there are.
          number: each has other questions.
        """
        config = self.config
        random = np.random.default_rng((_QUESTIONS, self.seed, windows, number))
        chosen = random.choice(windows * config.window_records, config.window_records, replace=False)
        each = [self._records(i // config.window_records).take([i % config.window_records]) for i in chosen.tolist()]
        return questions(Records(*map(np.concatenate, zip(*each, strict=True))), config)[0]

    def _records(self, window: int) -> Records:
        config, count = self.config, self.config.window_records
        total = config.symbols**config.key_tokens
        places = range(window * count, (window + 1) * count)
        keys = np.array([permutation.shuffled(place, total, self.seed, "dictionary") for place in places])
        return _with_values(keys, config, np.random.default_rng((_WINDOW, self.seed, window)))


def endless(config: ExperimentConfig, split: str) -> Endless:
    """Returns the documents of a split: of training, those of its curriculum; held out, of the task as it ends."""
    dictionary, packs = config.dictionary, config.data.batch_size // config.crossbatch.packing
    phases = tuple(step * packs for step in dictionary.records_steps)
    if split == "held_out":
        last = dictionary.records[-1:]
        dictionary, phases = dataclasses.replace(dictionary, records=last, records_steps=(), confusable=0.0), ()
    recipe = Recipe(dictionary, config.data.seed, tasks.SPLITS.index(split), phases)
    return Endless("dictionary", dictionary.document, recipe)


def tokenizer(config: DictionaryConfig) -> Tokenizer:
    """Returns the vocabulary as a tokenizer: marks as `<k>`, symbols as numbers from 0, with spaces between them."""
    names = (*MARK_NAMES, *map(str, range(config.symbols)))
    ids = {name: number for number, name in enumerate(names)}

    def encode(text: str) -> np.ndarray:
        unknown = [word for word in text.split() if word not in ids]
        if unknown:
            raise DataError(f"{unknown[0]!r} is no token of the dictionary task: write {', '.join(names[:6])}, ...")
        return np.array([ids[word] for word in text.split()], np.int32)

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        return [encode(text) for text in texts]

    def decode(tokens: Iterable[int]) -> str:
        return " ".join(names[token] for token in tokens if token < len(names))

    return Tokenizer(encode_batch, decode, len(names), PAD, PAD, f"dictionary-{config.symbols}")


def definitions(records: Records, config: DictionaryConfig) -> np.ndarray:
    """Returns windows [windows, config.window] of token ids that define the records in order."""
    return _windows(_tokens(KEY, records), config)


def questions(records: Records, config: DictionaryConfig) -> np.ndarray:
    """Returns windows [windows, config.window] of token ids that ask for the records in order, answers included."""
    return _windows(_tokens(QUERY, records), config)


def answers(tokens: np.ndarray, config: DictionaryConfig) -> np.ndarray:
    """Tells which tokens [..., whole windows] belong to a value that was asked for, bool."""
    windows = tokens.reshape(-1, config.window)
    records = windows[:, : config.window_records * config.record_tokens].reshape(len(windows), -1, config.record_tokens)
    asked = (records[..., :1] == QUERY) & (np.arange(config.record_tokens) >= config.key_tokens + 2)
    counted = np.zeros(windows.shape, bool)
    counted[:, : asked[0].size] = asked.reshape(len(windows), -1)
    return counted.reshape(tokens.shape)


def _repeated(count: int, places: int, random: np.random.Generator) -> np.ndarray:
    """Returns which of `count` records is in each place: all of them, in a random order, then all in another."""
    rounds = [random.permutation(count) for _ in range(-(-places // count))]
    return np.concatenate(rounds)[:places]


def _once(count: int, places: int, random: np.random.Generator) -> np.ndarray:
    """Returns which of `count` records is in each of the first places, each once."""
    return random.permutation(count)[:places]


FILLS = {"repeat": _repeated, "pad": _once}


def _keys(recipe: Recipe, number: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Returns the keys of a document as numbers, all different, in random order."""
    config = recipe.config
    confusable = _confusable(recipe, number, round(config.confusable * count))
    # Of `count` different keys, those that are confusable ones too are at most as many as these.
    others = random.choice(config.symbols**config.key_tokens, count, replace=False)
    together = np.concatenate([confusable, others])
    first = np.unique(together, return_index=True)[1]
    return random.permutation(together[np.sort(first)][:count])


def _confusable(recipe: Recipe, number: int, count: int) -> np.ndarray:
    """Returns keys as numbers; the i-th differs from the i-th of each neighbouring document in one token, at a place of
    its own, which all of them have different.
    """
    config = recipe.config
    if count == 0:
        return np.zeros(0, np.int64)
    group, place = divmod(number, config.confusable_documents)
    random = np.random.default_rng((_NEIGHBOURS, recipe.seed, recipe.split, group))
    keys = _symbols(random.integers(config.symbols**config.key_tokens, size=count), config.key_tokens, config)
    where = random.integers(config.key_tokens, size=count)
    orders = random.permuted(np.tile(np.arange(config.symbols), (count, 1)), axis=1)
    keys[np.arange(count), where] = orders[:, place]
    return keys @ config.symbols ** np.arange(config.key_tokens)


def _with_values(keys: np.ndarray, config: DictionaryConfig, random: np.random.Generator) -> Records:
    values = random.integers(config.symbols, size=(len(keys), config.value_tokens), dtype=np.int32)
    return Records(_symbols(keys, config.key_tokens, config).astype(np.int32), values)


def _symbols(numbers: np.ndarray, count: int, config: DictionaryConfig) -> np.ndarray:
    """Returns the last `count` digits of numbers to the base `symbols`, int64 [numbers, count]."""
    return numbers[:, None] // config.symbols ** np.arange(count) % config.symbols


def _tokens(mark: int, records: Records) -> np.ndarray:
    """Returns token ids [records, record_tokens]."""
    marks = np.full((len(records.keys), 1), mark), np.full((len(records.keys), 1), VALUE)
    key, value = records.keys + DICTIONARY_MARKS, records.values + DICTIONARY_MARKS
    return np.concatenate([marks[0], key, marks[1], value], axis=1, dtype=np.int32, casting="unsafe")


def _windows(records: np.ndarray, config: DictionaryConfig) -> np.ndarray:
    """Puts as many whole records as fit into each window; what is left of a window is padding."""
    windows = -(-len(records) // config.window_records)
    padded = np.full((windows * config.window_records, config.record_tokens), PAD, np.int32)
    padded[: len(records)] = records
    tokens = np.full((windows, config.window), PAD, np.int32)
    tokens[:, : config.window_records * config.record_tokens] = padded.reshape(windows, -1)
    return tokens
