"""What every source of a checkpoint gives: its config, what else it says, its tokenizer, and its weights."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fot.config import CrossbatchConfig, DataConfig, ExperimentConfig, ModelConfig
from fot.convert.hf_config import Origin
from fot.convert.weights import Read
from fot.errors import ConversionError

# Files of a Hugging Face folder that belong to the tokenizer.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")


class Source(NamedTuple):
    """A checkpoint that was opened; no weight is read yet.

    Attributes:
      config: a run's config with its model; None where a file holds weights alone.
      origin: what else it says.
      tokenizer: name -> content of files that belong to the tokenizer.
      weights: config of a model -> how its parameters are read; raises if the tensors aren't those of the config.
      notes: lines for the user.
    """

    config: ExperimentConfig | None
    origin: Origin
    tokenizer: dict[str, bytes]
    weights: Callable[[ModelConfig], Read]
    notes: tuple[str, ...] = ()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ConversionError: it can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"can't read {path} ({error.strerror}): name the folder or file that is there") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return values


def tokenizer_files(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the tokenizer's files in a folder."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def imported_config(model: ModelConfig, context: int) -> ExperimentConfig:
    """Returns a run's config for a model that was trained elsewhere: no crossbatch, a tokenizer from a file."""
    return ExperimentConfig(
        model=model,
        crossbatch=CrossbatchConfig(variant="none"),
        data=DataConfig(tokenizer="file", tokenizer_file="tokenizer.model", context=context),
    )
