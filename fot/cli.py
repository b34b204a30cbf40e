"""What every command shares: flags, `--config` with overrides of its fields, help, and errors in one line.

A command declares its own flags as a frozen dataclass; type, default and description come from there, as they do
for the config. A field without a default is required; a final _ (`from_`) is not part of the flag's name:

    @dataclasses.dataclass(frozen=True)
    class Flags:
        '''Flags of the command.

        Attributes:
          workdir: folder of checkpoints and metrics.
        '''

        workdir: str

    def main(config: ExperimentConfig, flags: Flags) -> None: ...

    if __name__ == "__main__":
        cli.run(main, Flags, usage=__doc__)
"""

import ast
import dataclasses
import inspect
import os
import pathlib
import re
import runpy
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import ml_collections

from fot import config as config_lib
from fot.config import ExperimentConfig
from fot.config.checks import nearest
from fot.errors import ConfigError, UserError

USER_ERROR, RETRY, INTERRUPTED = 2, 42, 130  # RETRY is that of `fot.termination`
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_HELP = ("-h", "--help")
_WIDTH = 110


class Command(NamedTuple):
    """A parsed command line: the validated config, and the command's own flags as its dataclass.

    Attributes:
      config: the validated config.
      flags: the command's own flags.
      file: value of --config, "" if it was not given.
      overrides: the words --config.name=text that changed the file's values, each name once.
    """

    config: ExperimentConfig
    flags: Any
    file: str
    overrides: tuple[str, ...]


Load = Callable[[Any], ExperimentConfig]
Complete = Callable[[dict[str, Any]], dict[str, Any]]


def run(
    main: Callable[[ExperimentConfig, Any], None],
    flags: type,
    usage: str | None,
    load: Load | None = None,
    argv: Sequence[str] | None = None,
    complete: Complete = dict,
) -> NoReturn:
    """Runs `main(config, flags)` and exits: 0, 2 after a `UserError` (one line on stderr), 130 after Ctrl-C.

    Args:
      main: the command.
      flags: frozen dataclass of the command's own flags.
      usage: printed by `--help`; the docstring of the command's module.
      load: gives the config, from the command's own flags, when `--config` is not on the command line (for
        example the config stored with a checkpoint); None makes `--config` required.
      argv: arguments without the program's name; None is those of the process.
      complete: gives the config's values, not validated yet, with what the file and the command line leave out.
    """

    def call() -> None:
        command = parse(sys.argv[1:] if argv is None else argv, flags, usage, load, complete)
        main(command.config, command.flags)

    sys.exit(exit_code(call))


def exit_code(call: Callable[[], None]) -> int:
    """Calls `call` and returns the exit code of the process; what a user can mend is printed as one line."""
    try:
        call()
        return 0
    except UserError as error:
        print("error:", _one_line(error), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(
    argv: Sequence[str], flags: type, usage: str | None, load: Load | None = None, complete: Complete = dict
) -> Command:
    """Parses a command line; arguments as for `run`.

    Raises:
      UserError: one line, for everything a user can get wrong.
      SystemExit: with code 0, after `--help` was printed.
    """
    wants_help = any(word in _HELP for word in argv)
    settings = _settings([word for word in argv if word not in _HELP], _all_kinds(flags), wants_help)
    overrides = {name.removeprefix("config."): text for name, text in settings.items() if name.startswith("config.")}
    if wants_help:
        values = load_file(settings["config"]) if "config" in settings else config_lib.to_dict(ExperimentConfig())
        _print_to_pipe(_help(usage, flags, override(values, overrides), load is None))
        raise SystemExit(0)
    own = _own_flags(flags, settings)
    if "config" in settings:
        values = load_file(settings["config"])
    elif load is not None:
        values = config_lib.to_dict(load(own))
    else:
        raise UserError("flag --config is required, such as --config=configs/code_tiny.py")
    config = config_lib.from_dict(complete(override(values, overrides)))
    words = tuple(f"--config.{name}={text}" for name, text in overrides.items())
    return Command(config, own, settings.get("config", ""), words)


def parse_flags(argv: Sequence[str], flags: type, usage: str | None) -> Any:
    """Parses the command line of a command without a config, and returns its flags; raises as `parse` does."""
    kinds = _flag_kinds(flags)
    wants_help = any(word in _HELP for word in argv)
    settings = _settings([word for word in argv if word not in _HELP], kinds, wants_help)
    if wants_help:
        lines = [
            inspect.cleandoc(usage or ""),
            "",
            "Flags:",
            *_flag_entries(flags),
            *_entry("help", "", "show this text"),
        ]
        _print_to_pipe("\n".join(lines))
        raise SystemExit(0)
    return _own_flags(flags, settings)


def load_file(path: str) -> dict[str, Any]:
    """Returns the values that `get_config()` of a config file gives, not validated yet.

    Raises:
      ConfigError: one line, if the file is missing, can't be run, or gives no ConfigDict.
    """
    if not os.path.isfile(path):
        names = sorted(str(found) for found in pathlib.Path(path).parent.glob("*.py"))
        raise ConfigError(f"config file {path!r} does not exist{nearest(path, names)}")
    values = run_file("config", path, "get_config")
    if not isinstance(values, ml_collections.ConfigDict):
        raise ConfigError(f"config file {path!r}: get_config() must return a ConfigDict, not {type(values).__name__}")
    return values.to_dict()


def run_file(kind: str, path: str, function: str) -> Any:
    """Returns what a function without arguments of a Python file gives.

    Raises:
      ConfigError: one line with the kind of the file and where it fails, if it can't be run or has no such function.
    """
    try:
        scope = runpy.run_path(path)
        if function not in scope:
            raise ConfigError(f"{kind} file {path!r} has no function {function}()")
        return scope[function]()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{kind} file {path!r}{_line_in(path, error)}: {_reason(error)}") from error


def override(values: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """Returns `values` with the fields in `texts` (dotted name to text on the command line) replaced.

    Raises:
      ConfigError: one line naming the flag, if its text does not have the field's type.
    """
    for name, text in texts.items():
        # A file may lack the group; from_dict names what is missing then.
        values = _replaced(values, name.split("."), _parse(f"config.{name}", _config_kinds()[name], text))
    return values


def _replaced(values: Any, path: list[str], value: Any) -> dict[str, Any]:
    group = dict(values) if isinstance(values, dict) else {}
    return {**group, path[0]: value if len(path) == 1 else _replaced(group.get(path[0], {}), path[1:], value)}


def _settings(words: list[str], kinds: dict[str, Any], ignore_missing: bool) -> dict[str, str]:
    """Returns {flag name: text}; the last of repeated flags counts. Names are checked, texts are not."""
    settings: dict[str, str] = {}
    words = list(reversed(words))
    while words:
        word = words.pop()
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: every argument is a flag, --name=value")
        name, equals, text = word.removeprefix("--").partition("=")
        _check_name(name, kinds)
        if not equals:
            # A flag alone is True if it is a bool; any other takes the next word (which may be -1, not a flag).
            if words and not words[-1].startswith("--") and (kinds[name] is not bool or words[-1].lower() in _BOOLS):
                text = words.pop()
            elif kinds[name] is bool:
                text = "true"
            elif ignore_missing:
                continue
            else:
                raise UserError(f"flag --{name} needs a value: --{name}=<{_kind_name(kinds[name])}>")
        settings[name] = text
    return settings


def _check_name(name: str, kinds: dict[str, Any]) -> None:
    if name in kinds:
        return
    if any(known.startswith(f"{name}.") for known in kinds):
        example = next(known for known in kinds if known.startswith(f"{name}."))
        raise ConfigError(f"--{name} is a group of fields: set one of them, such as --{example}")
    if name.startswith("config."):
        raise ConfigError(config_lib.unknown_field(name.removeprefix("config.")))
    own = [f"--{known}" for known in kinds if "." not in known] + ["--help"]
    raise UserError(f"unknown flag --{name}{nearest(f'--{name}', own) or '; --help lists all flags'}")


def _all_kinds(flags: type) -> dict[str, Any]:
    """Returns {flag: type} of the config's file and fields, and of a command's own flags."""
    return {"config": str} | {f"config.{name}": kind for name, kind in _config_kinds().items()} | _flag_kinds(flags)


def _flag_kinds(flags: type) -> dict[str, Any]:
    """Returns {flag: type} of a command's own flags; a field named `from_` is the flag --from, a word of Python."""
    return {name.removesuffix("_"): kind for name, kind in typing.get_type_hints(flags).items()}


def _own_flags(flags: type, settings: dict[str, str]) -> Any:
    kinds, values = _flag_kinds(flags), {}
    for field in dataclasses.fields(flags):
        name = field.name.removesuffix("_")
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in settings:
            raise UserError(f"flag --{name} is required: --{name}=<{_kind_name(kinds[name])}>")
        if name in settings:
            values[field.name] = _parse(name, kinds[name], settings[name])
    return flags(**values)


def _config_kinds() -> dict[str, Any]:
    """Returns {dotted name: type} of every config field."""
    return {f"{group}{name}": kind for group, cls in _groups() for name, kind in _plain_kinds(cls)}


def _groups(cls: type = ExperimentConfig, path: str = "") -> Iterator[tuple[str, type]]:
    """Yields (prefix, dataclass) of a config and of every group in it."""
    yield path, cls
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _groups(kind, f"{path}{name}.")


def _plain_kinds(cls: type) -> list[tuple[str, Any]]:
    return [(name, kind) for name, kind in typing.get_type_hints(cls).items() if not dataclasses.is_dataclass(kind)]


def _parse(name: str, kind: Any, text: str) -> Any:
    """Returns the text of a flag as a value of its type; elements of tuples are checked by `from_dict`."""
    wrong = ConfigError(f"--{name}={text}: {text!r} is not of type {_kind_name(kind)}")
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ConfigError(f"{wrong}: true or false")
        return _BOOLS[text.lower()]
    if typing.get_origin(kind) is not tuple:
        try:
            return kind(text)
        except ValueError:
            raise wrong from None
    if typing.get_args(kind)[0] is str:
        return _parse_words(text.strip())
    try:
        value = ast.literal_eval(text.strip() or "()")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ConfigError(f"{wrong}, such as --{name}={_example(kind)}") from None
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _parse_words(text: str) -> tuple[str, ...]:
    """Returns the words of `a,b`, `('a', 'b')` or `["a", "b"]`; a word may be empty, and hold brackets (globs do)."""
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    words = [word.strip() for word in text.split(",")]
    if not words[-1]:  # nothing at all, or after the last comma
        words.pop()
    return tuple(word.strip("'\"") for word in words)


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is not tuple:
        return kind.__name__
    inner = typing.get_args(kind)
    if inner[-1] is Ellipsis:
        return f"tuple of {_kind_name(inner[0])}"
    return f"({', '.join(_kind_name(each) for each in inner)})"


def _example(kind: Any) -> str:
    return "2,4" if typing.get_args(kind)[0] is int else '"((0,0),(1,1))"'


def _text(value: Any) -> str:
    """Returns a value as one writes it on the command line."""
    if isinstance(value, tuple | list) and value and not any(isinstance(each, tuple | list) for each in value):
        return ",".join(str(each) for each in value) + ("," if value[-1] == "" else "")
    if isinstance(value, tuple | list):
        return f'"{tuple(value)}"'.replace(" ", "")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


def _help(usage: str | None, flags: type, values: dict[str, Any], config_required: bool) -> str:
    current = dict(config_lib.fields(values))
    lines = [inspect.cleandoc(usage or ""), "", "Flags:", *_flag_entries(flags)]
    about = "file with get_config(), such as configs/code_tiny.py; any field can be changed as shown below"
    lines += _entry("config", "str, required" if config_required else "str", about)
    lines += _entry("help", "", "show this text; with --config, the values of that file")
    lines += ["", "Fields of the config, with their present values:"]
    for group, cls in _groups():
        if not _plain_kinds(cls):
            continue
        lines += ["", f"{group.rstrip('.')}: {_summary(cls)}"]
        for name, kind in _plain_kinds(cls):
            shown = "=" + _text(current[group + name]) if group + name in current else ""
            lines += _entry(f"config.{group}{name}{shown}", _kind_name(kind), _descriptions(cls)[name])
    return "\n".join(lines)


def _flag_entries(flags: type) -> list[str]:
    """Returns the help's lines about a command's own flags."""
    kinds, lines = _flag_kinds(flags), []
    for field in dataclasses.fields(flags):
        # Only plain defaults are shown; a factory's is the command's own business.
        shown = "" if field.default is dataclasses.MISSING else "=" + _text(field.default)
        required = "" if shown else ", required"
        name = field.name.removesuffix("_")
        lines += _entry(name + shown, _kind_name(kinds[name]) + required, _descriptions(flags)[field.name])
    return lines


def _entry(flag: str, kind: str, description: str) -> list[str]:
    indent = " " * 6
    text = textwrap.wrap(description, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [f"  --{flag}  ({kind})" if kind else f"  --{flag}", *text]


def _summary(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def _descriptions(cls: type) -> dict[str, str]:
    """Returns {field: text} from the docstring's section "Attributes"; "" where it says nothing."""
    descriptions = {field.name: "" for field in dataclasses.fields(cls)}
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    for name, text in re.findall(r"^  (\w+): (.*(?:\n {4}.*)*)", section, flags=re.MULTILINE):
        if name in descriptions:
            descriptions[name] = " ".join(text.split())
    return descriptions


def _line_in(path: str, error: Exception) -> str:
    """Returns ", line N" for the last line of the file that led to the error, "" if none did."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    message = error.msg if isinstance(error, SyntaxError) else _one_line(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _print_to_pipe(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader left, as in `--help | head`; without this Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())
