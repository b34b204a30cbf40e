"""Configs as nested plain values, and back."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from fot.config.checks import nearest
from fot.config.experiment import ExperimentConfig
from fot.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts of plain values; tuples stay tuples."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in (getattr(config, field.name),)
    }


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Freezes nested mappings (a ConfigDict, or parsed JSON) to a validated `ExperimentConfig`.

    Raises:
      ConfigError: one line naming the field, for an unknown or missing field, a wrong type or an invalid value.
    """
    return _build(ExperimentConfig, values, "")


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    types_by_name = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in types_by_name]
    if unknown:
        raise ConfigError(f"unknown config field {path}{unknown[0]}{nearest(unknown[0], types_by_name)}")
    missing = [name for name in types_by_name if name not in values]
    if missing:
        raise ConfigError(f"config field {path}{missing[0]} is missing")
    fields = {name: _convert(kind, values[name], path + name) for name, kind in types_by_name.items()}
    try:
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks that `value` has the type `kind`; lists (as JSON gives them) become tuples, ints become floats."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a group of fields, not {value!r}")
        return _build(kind, value, path + ".")
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r} must be a tuple, such as {path}=1,2")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ConfigError(f"{path}={value!r} must have {len(kinds)} elements")
        return tuple(_convert(k, v, path) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r} must be of type {kind.__name__}")
    return value


def fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field of a nested mapping."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from fields(value, f"{path}{name}.")
        else:
            yield path + name, value


def unknown_field(name: str) -> str:
    """Returns the one line to print for a dotted field name that no config has."""
    names = [known for known, _ in fields(to_dict(ExperimentConfig()))]
    return f"unknown config field {name}{nearest(name, names)}"


def differences(left: ExperimentConfig, right: ExperimentConfig) -> list[str]:
    """Returns 'name: left → right' for every field in which two configs differ."""
    right_values = dict(fields(to_dict(right)))
    return [
        f"{name}: {value!r} → {right_values[name]!r}"
        for name, value in fields(to_dict(left))
        if value != right_values[name]
    ]
