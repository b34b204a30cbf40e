"""Passkey retrieval: an oracle is right everywhere, nonsense nowhere, and the command writes what it found."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from fot import config as config_lib
from fot import generate, model
from fot.checkpoint import Checkpointer
from fot.data import passkey as data
from fot.data import tokenizer as tokenizers
from fot.errors import ConfigError
from fot.evaluate import __main__ as command
from fot.evaluate import passkey
from fot.evaluate import passkey_report as report

MODEL = config_lib.ModelConfig(
    vocab_size=64, layers=2, dim=16, heads=2, kv_heads=2, head_dim=8, mlp_dim=16, memory_layers=(1,), attention_block=32
)


def config(task="passkey", **evaluate) -> config_lib.ExperimentConfig:
    settings = dict(lengths=(100, 300), depths=(0.0, 0.5, 1.0), trials=5, batch_size=2, neighbours=4, block=64)
    return config_lib.ExperimentConfig(
        model=MODEL,
        crossbatch=config_lib.CrossbatchConfig(packing=4, w=3),
        data=config_lib.DataConfig(task=(task,), context=32, batch_size=16, tokenizer="bytes"),
        dictionary=config_lib.DictionaryConfig(document=128, window=32),
        passkey=config_lib.PasskeyConfig(document=128, tokens=(128,)),
        evaluate=config_lib.EvaluateConfig(**{**settings, **evaluate}),
        generate=config_lib.GenerateConfig(last_context_length=16, reader="knn", memory_block=1024),
        mesh=config_lib.MeshConfig(data=-1, fsdp=1, tensor=2),
    )


BYTES = tokenizers.byte_tokenizer(config().data, MODEL)
ENCODERS = {"words": data.tokenizer(config()), "bytes": BYTES}


def log(line: str) -> None:
    assert "\n" not in line


def oracle(encoder, change=lambda key: f" {key}.", rows=2):
    """Returns what continues prompts with the key that it reads there, as changed."""

    def follow(prompts, show):
        assert len(prompts) == rows
        show(3, 1000.0)
        texts = [encoder.decode(tokens.tolist()) for tokens in prompts]
        keys = [re.search(r"(\d+) is the pass key\.", text) for text in texts]
        return [encoder.encode(change(key[1] if key else "")) for key in keys]

    return follow


@pytest.mark.parametrize("name", ENCODERS)
def test_an_oracle_is_always_right(name):
    encoder = ENCODERS[name]
    cells = passkey.ask(oracle(encoder), config(lengths=(400, 1000)), encoder, log)
    assert [(each.length, each.depth) for each in cells] == [(n, d) for n in (400, 1000) for d in (0.0, 0.5, 1.0)]
    for each in cells:
        assert (each.trials, each.correct, each.accuracy, each.error, each.wrong) == (5, 5, 1, 0, ())
        assert each.length - 30 < each.tokens <= each.length


@pytest.mark.parametrize(
    "change", [lambda key: " The grass is green.", lambda key: f" {key}7.", lambda key: f" {key[1:]}.", lambda key: ""]
)
def test_what_is_not_the_key_is_wrong(change):
    encoder = ENCODERS["bytes"]
    for each in passkey.ask(oracle(encoder, change), config(lengths=(400,)), encoder, log):
        assert (each.trials, each.correct, each.accuracy, each.error) == (5, 0, 0, 0)
        assert len(each.wrong) == report.KEPT_WRONG
        for wrong in each.wrong:
            assert wrong.answer == change(wrong.key)


def test_every_key_is_another_and_comes_of_the_seed():
    asked = []

    def remember(prompts, show):
        asked.extend(tokens.tobytes() for tokens in prompts)
        return [np.zeros(0, np.int32) for _ in prompts]

    encoder, whole = ENCODERS["words"], config(batch_size=5)
    passkey.ask(remember, whole, encoder, log)
    first, asked = asked, []
    assert len(set(first)) == len(first) == 30
    passkey.ask(remember, whole, encoder, log)
    assert asked == first
    asked = []
    passkey.ask(remember, dataclasses.replace(whole, data=dataclasses.replace(whole.data, seed=1)), encoder, log)
    assert not set(asked).intersection(first)


def test_accuracy_and_its_error():
    found = report.cell(100, 98, 0.5, 4, [report.Wrong("12", "3")])
    assert (found.correct, found.accuracy) == (3, 0.75)
    np.testing.assert_allclose(found.error, np.sqrt(0.75 * 0.25 / 4))
    table = report.table([found, report.cell(2048, 2040, 0.5, 4, [])])
    assert table.splitlines()[1].split() == ["depth", "100", "2k"]
    assert table.splitlines()[2].split()[:4] == ["0.5", "75.0", "±", "21.7%"]
    assert table.splitlines()[3].split()[-3:] == ["100.0", "±", "0.0%"]


def test_a_length_without_room_is_refused():
    with pytest.raises(ConfigError, match="prompt of 50 tokens has no room for filler"):
        passkey.ask(oracle(ENCODERS["words"]), config(lengths=(50, 300)), ENCODERS["words"], log)


def save(folder, run: config_lib.ExperimentConfig) -> str:
    params = jax.jit(lambda key: model.init(key, run.model))(jax.random.key(0))
    with Checkpointer(folder / "checkpoints", run.train) as checkpoints:
        checkpoints.save(7, {"params": params}, {}, run)
    return str(folder)


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    return caught.value.code


@pytest.mark.parametrize("task", ["passkey", "python_stdlib"])
def test_the_command(task, tmp_path, capsys):
    """By a model that never trained, of words and of bytes."""
    run = config(task)
    if task != "passkey":
        run = dataclasses.replace(run, model=dataclasses.replace(MODEL, vocab_size=300))
    workdir = save(tmp_path / "run", run)
    words = [f"--workdir={workdir}", "--lengths=400,1k", "--depths=1,0", "--trials=3", f"--output={tmp_path / 'out'}"]
    assert exit_code("passkey", *words) == 0
    captured = capsys.readouterr()
    assert "step 7, reader knn" in captured.out and "prompt 12/12" in captured.err
    assert [line.split()[0] for line in captured.out.splitlines()[-6:-2]] == ["depth", "0", "1", "all"]
    found = json.loads((tmp_path / "out" / "passkey.json").read_text())
    assert (found["step"], found["config"]["evaluate"]["trials"]) == (7, 3)
    assert [(each["length"], each["depth"]) for each in found["cells"]] == [(400, 0), (400, 1), (1024, 0), (1024, 1)]
    for each in found["cells"]:
        assert (each["trials"], each["correct"], each["error"], len(each["wrong"])) == (3, 0, 0, 3)
    assert (tmp_path / "out" / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_with_an_oracle(tmp_path, capsys, monkeypatch):
    def follow(weights, config, prompts, mesh, *, stop, show):
        assert config.generate.max_new_tokens == 7 and config.generate.temperature == 0 and stop == [data.EOS]
        return oracle(ENCODERS["words"])(prompts, show)

    monkeypatch.setattr(generate, "generate", follow)
    workdir = save(tmp_path, config())
    assert exit_code("passkey", f"--workdir={workdir}") == 0
    found = json.loads((tmp_path / "passkey.json").read_text())
    assert [each["accuracy"] for each in found["cells"]] == [1] * 6 and (tmp_path / "passkey.png").exists()
    assert capsys.readouterr().out.count("100.0 ± 0.0%") == 6 + 8


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    workdir = f"--workdir={save(tmp_path / 'run', config())}"
    other = dataclasses.replace(config("dictionary"), crossbatch=config_lib.CrossbatchConfig(packing=4, w=3))
    for words, message in [
        ([workdir, "--lengths=1k,2q"], "--lengths=1k,2q: '2q' is no number of tokens"),
        ([workdir, "--lengths=64"], "a passkey prompt of 64 tokens has no room for filler"),
        ([workdir, "--depths=0,1.5"], "--depths=0,1.5: depths are numbers from 0 to 1"),
        ([workdir, "--depths=a"], "--depths=a: depths are numbers from 0 to 1"),
        ([workdir, "--trials=-1"], "--trials=-1 must be 1 or more"),
        ([f"--workdir={tmp_path / 'none'}"], "none"),
        ([f"--workdir={save(tmp_path / 'other', other)}"], "is no token of the dictionary task"),
    ]:
        assert exit_code("passkey", *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert exit_code("perplexity", workdir) == 2
    assert "run python -m fot.evaluate passkey instead" in capsys.readouterr().err
