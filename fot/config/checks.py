"""Checks of a field, each one line that names it and the remedy."""

import difflib
from collections.abc import Iterable
from typing import Any

from fot.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with that message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def positive(config: Any, *names: str) -> None:
    """Raises ConfigError if one of these fields isn't above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be greater than 0")


def not_negative(config: Any, *names: str) -> None:
    """Raises ConfigError if one of these fields is below 0."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name}={value} must be 0 or greater")


def one_of(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError, with the nearest choice, if the field is none of them."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns what to add to an error about a misspelt name; "" if no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
