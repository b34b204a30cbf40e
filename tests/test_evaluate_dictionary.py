"""Dictionary lookup by a model made by hand, which has to be right everywhere, and by spoilt ones, which are not."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fot import config as config_lib
from fot import crossbatch, loading, model, objective, sharding
from fot.attention import Tokens
from fot.checkpoint import Checkpointer
from fot.data import dictionary as data
from fot.errors import ConfigError, UserError
from fot.evaluate import __main__ as command
from fot.evaluate import dictionary, sizes
from fot.evaluate import dictionary_report as report

SETTINGS = config_lib.DictionaryConfig(symbols=12, key_tokens=2, value_tokens=1, document=64, window=32)
V, H = SETTINGS.symbols + config_lib.DICTIONARY_MARKS, 34
MODEL = config_lib.ModelConfig(
    vocab_size=V,
    layers=2,
    dim=4 * V + 1,
    heads=3,
    kv_heads=3,
    head_dim=H,
    mlp_dim=8,
    memory_layers=(1,),
    qk_norm=False,
    attention_block=32,
)
LENGTHS = (32, 256, 768)  # the last has all 144 keys


def config(**evaluate) -> config_lib.ExperimentConfig:
    defaults = dict(memory=LENGTHS, readers=("knn",), neighbours=2, block=64, windows=3, questions=5)
    return config_lib.ExperimentConfig(
        model=MODEL,
        data=config_lib.DataConfig(task=("dictionary",), context=32),
        dictionary=SETTINGS,
        mesh=config_lib.MeshConfig(data=-1, fsdp=1),
        evaluate=config_lib.EvaluateConfig(**{**defaults, **evaluate}),
    )


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])


def by_hand(noise: float = 0.0) -> model.Params:
    """Returns a model that looks values up: `noise` on its keys makes it err.

    The residual stream is [token, 1, the token before, the second before, the third before]. Three heads of layer 0
    find these by RoPE. In layer 1 a value's key is the two tokens of its record's key, and that it follows a <v>; a
    query at <v> is the two tokens before.
    """
    token, one, before = slice(0, V), V, [slice(V + 1 + V * i, V + 1 + V * (i + 1)) for i in range(3)]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(lambda key: model.init(key, MODEL), KEY))
    params["embedding"][:, token], params["embedding"][:, one] = np.eye(V), 1
    for norm in (params["final_norm"], params["layers"]["attention_norm"], params["layers"]["mlp_norm"]):
        norm[...] = 1
    query, key, value, output = (params["layers"]["attention"][n] for n in ("query", "key", "value", "output"))
    angles = MODEL.rope_theta ** (-np.arange(H // 2) / (H // 2))
    for head, place in enumerate(before):
        key[0, one, head, : H // 2] = 1
        query[0, one, head] = 60 * np.concatenate([np.cos((head + 1) * angles), -np.sin((head + 1) * angles)])
        value[0, token, head, :V] = np.eye(V) / np.sqrt(MODEL.dim / 2)
        output[0, head, :V, place] = np.eye(V)
    key[1, before[1], 0, :V] = key[1, before[2], 0, V : 2 * V] = np.eye(V)
    key[1, before[0].start + data.VALUE, 0, 2 * V] = 1
    query[1, before[0], 0, :V] = query[1, before[1], 0, V : 2 * V] = 30 * np.eye(V)
    query[1, one, 0, 2 * V] = 30
    value[1, token, 0, :V] = output[1, 0, :V, token] = 3 * np.eye(V)
    key[1] += noise * np.random.default_rng(0).standard_normal(key[1].shape)
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


KEY = jax.random.key(0)
NOISY = 0.25


def log(line: str) -> None:
    assert "\n" not in line


@pytest.mark.parametrize("reader", config_lib.READER_NAMES)
@pytest.mark.parametrize("dtype", config_lib.MEMORY_DTYPES)
def test_a_model_that_looks_up_is_always_right(reader, dtype, mesh):
    [curve] = dictionary.evaluate(by_hand(), config(readers=(reader,), memory_dtype=dtype), mesh, log)
    assert [point.memory for point in curve.points] == list(LENGTHS) and reader in curve.label
    for point in curve.points:
        assert (point.questions, point.tokens) == (5 * 6, 5 * 6)
        assert (point.token_accuracy, point.token_error, point.value_accuracy) == (1, 0, 1)


def test_without_its_memory_it_is_not(mesh, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda params, config, memory, *rest: memory)
    [curve] = dictionary.evaluate(by_hand(), config(), mesh, log)
    assert all(point.token_accuracy < 0.4 for point in curve.points)


def test_a_memory_of_one_window_gives_what_contexts_give_in_training(mesh):
    """Every token of the questions, and with a model that errs."""
    asked = data.Dictionary(SETTINGS, 0)
    params = by_hand(NOISY)
    reader = dictionary.of_config("dense", config())
    memory = loading.store(mesh).empty(MODEL, 1, 32, "float32")
    how = loading.Loading(reader, 1, "refuse")
    windows = dictionary._windows(asked, range(1), 1)
    memory = loading.load(params, MODEL, memory, windows, how, mesh, lambda *rest: None)
    tokens = asked.questions(1, 0)
    found = np.asarray(dictionary._ask(MODEL, reader, mesh)(params, memory, tokens))

    batch = np.stack([asked.definitions(0), tokens])
    places = np.arange(64, dtype=np.int32).reshape(2, 32)
    crossing = config_lib.CrossbatchConfig(packing=2)
    table = crossbatch.make_table(crossing, 2, 1)
    output = jax.jit(
        lambda params: model.apply(params, batch, Tokens(np.zeros_like(places), places), MODEL, table=table)
    )(params)
    _, correct = objective.token_nll(params, output.hidden[1:], np.roll(tokens, -1)[None], MODEL)
    np.testing.assert_array_equal(found, correct[0])
    counted = data.answers(tokens, SETTINGS)
    assert 0 < np.append(False, found[:-1])[counted].mean() < 1


def test_a_length_does_not_depend_on_the_others(mesh):
    def points(lengths):
        [curve] = dictionary.evaluate(by_hand(NOISY), config(memory=lengths), mesh, log)
        return [dataclasses.replace(point, load_seconds=0.0, ask_seconds=0.0) for point in curve.points]

    together = points((0, *LENGTHS))
    assert together[1:2] == points((256,)) and together[2:] == points((768,))
    assert all(0.05 < point.token_accuracy < 0.95 and point.token_error > 0 for point in together[1:])
    assert together[0].token_accuracy > together[2].token_accuracy


def test_a_plain_transformer_reads_the_definitions_in_its_local_context(mesh):
    curve = dictionary.evaluate_plain(by_hand(), config(plain_tokens=256), mesh, log)
    assert [(point.memory, point.value_accuracy) for point in curve.points] == [(32, 1), (256, 1)]


def test_accuracy_and_its_error():
    correct = np.array([[True, True], [True, False], [False, False], [True, True]])
    point = report.point(64, correct, 1.0, 2.0)
    assert (point.questions, point.tokens, point.token_accuracy, point.value_accuracy) == (4, 8, 5 / 8, 1 / 2)
    np.testing.assert_allclose(point.value_error, np.sqrt(0.5 * 0.5 / 4))
    np.testing.assert_allclose(point.token_error, np.std([1, 0.5, 0, 1]) / 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(memory=(48,)), "48 tokens is no whole number of windows of 32"),
        (dict(memory=(32, 800)), "800 tokens has more records than there are keys: ask for at most 768"),
        (dict(memory=(0,)), "no length above 0"),
    ],
)
def test_lengths_that_cannot_be_are_one_line(changes, text, mesh):
    for function in (dictionary.evaluate, dictionary.evaluate_plain):
        with pytest.raises(ConfigError) as error:
            function(by_hand(), config(**changes), mesh, log)
        assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16k,256k,1m", (2**14, 2**18, 2**20)), ("1g", (2**30,)), ("256", (256,)), (" 2K , 1k,1024", (1024, 2048))],
)
def test_sizes(text, expected):
    assert sizes.parse(text, "memory") == expected
    assert sizes.parse(sizes.listed(expected), "memory") == expected


@pytest.mark.parametrize("text", ["", "16q", "k", "1.5k", "-1", "0", "16k,,1m", "16 k"])
def test_a_size_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="is no number of tokens: write such as 4096,16k,1m") as error:
        sizes.parse(text, "memory")
    assert str(error.value).startswith(f"--memory={text}: ") and "\n" not in str(error.value)


def save(folder, run: config_lib.ExperimentConfig, params: model.Params) -> str:
    with Checkpointer(folder / "checkpoints", run.train) as checkpoints:
        checkpoints.save(7, {"params": params}, {}, run)
    return str(folder)


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    return caught.value.code


def plain(run: config_lib.ExperimentConfig) -> config_lib.ExperimentConfig:
    return dataclasses.replace(
        run,
        crossbatch=config_lib.CrossbatchConfig(variant="none", packing=1),
        data=dataclasses.replace(run.data, context=64, batch_size=8),
    )


def test_the_command(tmp_path, capsys):
    run = config()
    words = [f"--workdir={save(tmp_path / 'fot', run, by_hand())}", "--memory=32,256"]
    words += [f"--plain={save(tmp_path / 'plain', plain(run), by_hand(NOISY))}", f"--output={tmp_path / 'out'}"]
    assert exit_code("dictionary", *words) == 0
    shown = capsys.readouterr().out
    rows = [line.split("  ") for line in shown.splitlines()]
    assert [row[-1].strip() for row in rows if row[0] == "FoT, knn, k = 2"] == ["100.0 ± 0.0%"]
    assert "plain transformer" in [row[0] for row in rows]
    found = json.loads((tmp_path / "out" / "dictionary.json").read_text())
    assert (found["step"], found["config"]["evaluate"]["memory"]) == (7, [32, 256])
    assert [[p["memory"] for p in curve["points"]] for curve in found["curves"]] == [[32, 256], [32, 256]]
    assert found["curves"][0]["points"][1]["token_accuracy"] == 1 > found["curves"][1]["points"][1]["token_accuracy"]
    assert (tmp_path / "out" / "dictionary.png").read_bytes().startswith(b"\x89PNG")

    other = dataclasses.replace(plain(run), dictionary=dataclasses.replace(SETTINGS, value_tokens=2))
    text = dataclasses.replace(run, data=dataclasses.replace(run.data, task=("python_stdlib",)))
    for wrong, message in [
        ([words[0], "--memory=32,9x"], "--memory=32,9x: '9x' is no number of tokens"),
        ([words[0], "--plain=" + words[0].partition("=")[2]], "was trained with crossbatch"),
        ([words[0], f"--plain={save(tmp_path / 'other', other, by_hand())}"], "differ in dictionary.value_tokens"),
        ([f"--workdir={save(tmp_path / 'text', text, by_hand())}"], "holds a run of data.task=python_stdlib"),
    ]:
        assert exit_code("dictionary", *wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert exit_code("perplexity", words[0]) == 2
    assert "run python -m fot.evaluate dictionary instead" in capsys.readouterr().err
