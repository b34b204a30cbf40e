"""The command line: the syntax of overrides, help, and every error of the user in one line."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from fot import cli
from fot import config as config_lib
from fot.errors import DataError, UserError

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "code_tiny.py")
USAGE = "Does a thing.\n\nUsage: python -m fot.thing --config=FILE --workdir=DIR"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of checkpoints
        and metrics.
      names: several names.
    """

    workdir: str
    names: tuple[str, ...] = ()
    count: int = 3
    quick: bool = False


MESH = {"data": 2, "fsdp": 1, "tensor": 1, "sequence": 1}


def parse(*words: str) -> cli.Command:
    return cli.parse([f"--config={TINY}", "--workdir=runs/x", *words], Flags, USAGE)


def field(config: config_lib.ExperimentConfig, name: str):
    return dict(config_lib.fields(config_lib.to_dict(config)))[name]


OVERRIDES = [
    ("model.layers", "8", 8),
    ("mesh.fsdp", "-1", -1),
    ("optimizer.learning_rate", "1e-3", 1e-3),
    ("optimizer.learning_rate", "1", 1.0),
    ("model.qk_norm", "false", False),
    ("model.qk_norm", "True", True),
    ("data.cache_dir", "", ""),
    ("data.cache_dir", "a=b c", "a=b c"),
    ("model.memory_layers", "2,3", (2, 3)),
    ("model.memory_layers", "2", (2,)),
    ("model.memory_layers", "2,", (2,)),
    ("model.memory_layers", "(1, 3)", (1, 3)),
    ("model.memory_layers", "[1,3]", (1, 3)),
    ("crossbatch.d_steps", "40", (40,)),
    ("crossbatch.segments", "((0,0),(1,1))", ((0, 0), (1, 1))),
    ("crossbatch.segments", "(0,0),(1,1)", ((0, 0), (1, 1))),
    ("evaluate.memory", "0,256,1024", (0, 256, 1024)),
    ("evaluate.readers", "dense", ("dense",)),
    ("evaluate.readers", "dense,knn", ("dense", "knn")),
    ("evaluate.readers", "('dense', 'knn')", ("dense", "knn")),
    ("evaluate.readers", "dense,", ("dense",)),
    ("data.files", "a/**/*.[ch]", ("a/**/*.[ch]",)),
    ("data.files", "[ab]/*.txt,c.txt", ("[ab]/*.txt", "c.txt")),
    ("data.files", ",", ("",)),
]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("name", "text", "value"), OVERRIDES)
def test_overrides(name, text, value, joined):
    words = [f"--config.{name}={text}"] if joined else [f"--config.{name}", text]
    found = field(parse(*words).config, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["()", ""])
def test_empty_tuples(text):
    command = parse(f"--config.model.memory_layers={text}", "--config.crossbatch.variant=none")
    assert command.config.model.memory_layers == ()


def test_every_default_can_be_written_as_help_shows_it():
    values = config_lib.to_dict(config_lib.ExperimentConfig())
    texts = {name: cli._text(value).strip('"') for name, value in config_lib.fields(values)}
    assert cli.override(values, texts) == values


def test_overrides_leave_the_other_fields_as_the_file_says():
    config = parse("--config.model.layers=8").config
    whole = config_lib.from_dict(cli.load_file(TINY))
    assert config_lib.differences(whole, config) == ["model.layers: 4 → 8"]


def test_a_flag_may_be_a_word_of_python(capsys):
    @dataclasses.dataclass(frozen=True)
    class Words:
        """Flags.

        Attributes:
          from_: where it begins.
        """

        from_: str

    assert cli.parse([f"--config={TINY}", "--from=here"], Words, USAGE).flags == Words("here")
    with pytest.raises(UserError, match="flag --from is required"):
        cli.parse([f"--config={TINY}"], Words, USAGE)
    with pytest.raises(SystemExit):
        cli.parse(["--help"], Words, USAGE)
    assert re.search(r"--from  \(str, required\)\n +where it begins", capsys.readouterr().out)


def test_values_that_are_left_out_can_be_completed():
    command = cli.parse(
        [f"--config={TINY}", "--workdir=x"], Flags, USAGE, complete=lambda values: values | {"mesh": MESH}
    )
    assert command.config.mesh == config_lib.MeshConfig(**MESH)


def test_the_last_of_repeated_flags_counts():
    assert parse("--config.model.layers=8", "--config.model.layers=6").config.model.layers == 6


def test_a_bool_flag_alone_is_true():
    assert parse("--quick", "--count", "4").flags == Flags("runs/x", count=4, quick=True)
    assert parse("--quick", "false").flags == Flags("runs/x")
    assert parse("--config.model.memory_gate", "--quick").config.model.memory_gate is True


def test_own_flags_have_their_defaults():
    assert parse().flags == Flags("runs/x")
    assert parse("--names=a,b").flags.names == ("a", "b")


def test_load_gives_the_config_where_no_file_does(tiny_config):
    argv = ["--workdir=runs/x", "--config.model.layers=8"]
    command = cli.parse(argv, Flags, USAGE, load=lambda flags: tiny_config)
    assert config_lib.differences(tiny_config, command.config) == ["model.layers: 4 → 8"]


WRONG = [
    (["--config.model.dims=3"], "unknown config field model.dims; did you mean 'model.dim'?"),
    (["--config.model.dims"], "unknown config field model.dims"),
    (["--config.model=3"], "--config.model is a group of fields"),
    (["--config.model.layers=abc"], "--config.model.layers=abc: 'abc' is not of type int"),
    (["--config.model.layers=2.5"], "is not of type int"),
    (["--config.model.layers"], "flag --config.model.layers needs a value"),
    (["--config.model.layers", "--quick"], "flag --config.model.layers needs a value"),
    (["--config.model.qk_norm=maybe"], "true or false"),
    (["--config.optimizer.learning_rate=high"], "'high' is not of type float"),
    (["--config.model.memory_layers=a"], "'a' is not of type tuple of int, such as --config.model.memory_layers=2,4"),
    (["--config.model.memory_layers=9"], "model.memory_layers=(9,): layer 9 does not exist"),
    (["--config.model.memory_layers=2.5"], "model.memory_layers=2.5 must be of type int"),
    (["--config.crossbatch.segments=1,2"], "crossbatch.segments=1 must be a tuple"),
    (["--config.crossbatch.packing=3"], "must be a multiple of crossbatch.packing"),
    (["--config.crossbatch.d=1,5"], "d can be at most 4"),
    (["--config.evaluate.readers=faiss"], "evaluate.readers: 'faiss' is not one of"),
    (["--wokdir=x"], "unknown flag --wokdir; did you mean '--workdir'?"),
    (["--count=x"], "--count=x: 'x' is not of type int"),
    (["runs/y"], "unexpected argument 'runs/y'"),
    (["--config=configs/no/such.py"], "config file 'configs/no/such.py' does not exist"),
    ([f"--config={TINY[:-5]}ni.py"], f"did you mean {TINY!r}?"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words[0][:40] for words, _ in WRONG])
def test_errors_of_the_user(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [([f"--config={TINY}"], "flag --workdir is required"), (["--workdir=x"], "flag --config is required")],
)
def test_required_flags(argv, message):
    with pytest.raises(UserError, match=message):
        cli.parse(argv, Flags, USAGE)


BAD_FILES = [
    ("import ml_collections\nx = 1 +\n", r", line 2: SyntaxError: "),
    ("import no_such_module\n", r", line 1: ModuleNotFoundError: "),
    ("def get_config():\n    raise ValueError('one\\ntwo')\n", r", line 2: ValueError: one two$"),
    ("def get_config():\n    return 3\n", r"must return a ConfigDict, not int$"),
    ("x = 1\n", r"has no function get_config\(\)$"),
    (
        "from configs import base\ndef get_config():\n    config = base.get_config()\n    config.model.dims = 3\n",
        r", line 4: \w+: .*dims",
    ),
    (
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'modle': 3})\n",
        r"unknown config field modle; did you mean 'model'\?$",
    ),
    (
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({})\n",
        r"config field model is missing$",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[str(index) for index in range(len(BAD_FILES))])
def test_errors_in_a_config_file(text, message, tmp_path):
    path = tmp_path / "run.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        cli.parse([f"--config={path}", "--workdir=x"], Flags, USAGE)
    assert len(str(caught.value).splitlines()) == 1


def test_help_shows_usage_flags_and_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--help"], Flags, USAGE)
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert shown.startswith(USAGE)
    assert "--workdir  (str, required)\n      folder of checkpoints and metrics." in shown
    assert "--config.model.memory_layers=2  (tuple of int)\n      indices (from 0) of the layers" in shown
    for name, _ in config_lib.fields(config_lib.to_dict(config_lib.ExperimentConfig())):
        assert f"--config.{name}=" in shown


def test_help_shows_the_values_of_the_file_and_the_overrides(capsys):
    with pytest.raises(SystemExit):
        cli.parse([f"--config={TINY}", "--config.model.heads=2", "-h"], Flags, USAGE)
    shown = capsys.readouterr().out
    assert "--config.model.dim=64  (int)" in shown
    assert "--config.model.heads=2  (int)" in shown


def test_every_described_field_exists():
    for _, cls in cli._groups():
        described = re.findall(r"^      (\w+): ", cls.__doc__, flags=re.MULTILINE)
        assert set(described) <= {field.name for field in dataclasses.fields(cls)}


def raises(error: BaseException):
    def call():
        raise error

    return call


def test_exit_codes(capsys):
    assert cli.exit_code(lambda: None) == 0
    assert cli.exit_code(raises(DataError("no documents\n  in data.files"))) == 2
    assert cli.exit_code(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: no documents in data.files\ninterrupted\n"
    with pytest.raises(ZeroDivisionError):
        cli.exit_code(raises(ZeroDivisionError()))


PROGRAM = f'''"""{USAGE}"""
import dataclasses
from fot import cli
from fot.errors import DataError


@dataclasses.dataclass(frozen=True)
class Flags:
    workdir: str


def main(config, flags):
    if flags.workdir == "nowhere":
        raise DataError("no documents")
    print(config.model.memory_layers, flags.workdir)


if __name__ == "__main__":
    cli.run(main, Flags, usage=__doc__)
'''


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["--workdir=x", "--config.model.memory_layers=1,3"], 0, "(1, 3) x\n", ""),
        (["--workdir=x", "--config.model.layrs=3"], 2, "", "error: unknown config field model.layrs; did you mean"),
        (["--workdir=nowhere"], 2, "", "error: no documents\n"),
    ],
)
def test_as_a_process(words, code, out, err, tmp_path):
    program = tmp_path / "thing.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "--config=configs/code_tiny.py", *words]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout == out
    assert done.stderr.startswith(err)
    assert len(done.stderr.splitlines()) == (code != 0)


def test_a_command_knows_its_file_and_its_overrides():
    command = parse("--config.model.layers", "8", "--quick", "--config.model.layers=4")
    assert (command.file, command.overrides) == (TINY, ("--config.model.layers=4",))


def test_a_command_without_a_config_has_its_own_flags_alone(capsys):
    assert cli.parse_flags(["--workdir", "x", "--quick"], Flags, USAGE) == Flags(workdir="x", quick=True)
    with pytest.raises(UserError, match="flag --workdir is required"):
        cli.parse_flags([], Flags, USAGE)
    with pytest.raises(UserError, match="unknown flag --confg"):
        cli.parse_flags(["--confg=a"], Flags, USAGE)
    with pytest.raises(SystemExit):
        cli.parse_flags(["--help"], Flags, USAGE)
    shown = capsys.readouterr().out
    assert "--count=3" in shown and "--config" not in shown.replace("--config=FILE", "")
