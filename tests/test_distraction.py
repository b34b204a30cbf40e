"""Distraction: r_d is the share of a softmax over all contexts, whatever the way it is computed in."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import layers, model, sharding
from fot.attention import Partial, Tokens
from fot.crossbatch import Table
from fot.data import corpus as corpora
from fot.errors import ConfigError, DataError, UserError
from fot.evaluate import __main__ as command
from fot.evaluate import distraction
from fot.evaluate import distraction_report as report

T = 8
COUNTS = (1, 2, 5)
MODEL = config_lib.ModelConfig(
    vocab_size=64,
    layers=2,
    dim=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    memory_layers=(0, 1),
    attention_block=8,
)
MODEL = dataclasses.replace(MODEL, memory_positions="zero", qk_norm=False)
MODELS = {
    "longllama": MODEL,
    "gate": dataclasses.replace(MODEL, memory_gate=True, memory_positions="none", qk_norm=True),
}
GENERATOR = np.random.default_rng(0)
CORPUS = corpora.from_arrays([GENERATOR.integers(3, 64, length) for length in (70, 17, 40, 33, 15)])


def config(chosen: config_lib.ModelConfig = MODEL, **changes) -> config_lib.ExperimentConfig:
    return config_lib.ExperimentConfig(
        model=chosen,
        crossbatch=config_lib.CrossbatchConfig(variant="none"),
        data=config_lib.DataConfig(context=T),
        evaluate=config_lib.EvaluateConfig(
            **{"contexts": COUNTS, "query_windows": 7, "batch_size": 4, "block": 16, **changes}
        ),
    )


@functools.cache
def mesh(devices: int = 1, tensor: int = 1):
    return sharding.make_mesh(config_lib.MeshConfig(tensor=tensor), jax.devices()[:devices])


@functools.cache
def params(chosen: config_lib.ModelConfig) -> model.Params:
    return jax.jit(lambda key: model.init(key, chosen))(jax.random.key(0))


def measure(chosen=MODEL, corpus=CORPUS, on=None, **changes) -> report.Masses:
    return distraction.evaluate(params(chosen), config(chosen, **changes), corpus, on or mesh())


@pytest.mark.parametrize("name", MODELS)
def test_streamed_equals_all_logits_at_once(name):
    # Rows as in training: all previous contexts, then all windows of queries, which see them by a crossbatch table.
    chosen, found = MODELS[name], measure(MODELS[name])
    count, pairs = max(COUNTS), distraction.choose(CORPUS, T, max(COUNTS), 7, 0)
    P = len(pairs)
    starts = [(pair.document, pair.start) for pair in pairs] + [(pair.document, pair.start + T) for pair in pairs]
    inputs = np.stack([CORPUS.read(document, start, start + T) for document, start in starts])
    documents = np.repeat(np.array([[document] for document, _ in starts]), T, axis=1)
    tokens = Tokens(documents, np.stack([start + np.arange(T) for _, start in starts]))
    seen = distraction.others(pairs, count)
    table = Table(np.concatenate([np.full(seen.shape, -1, np.int32), seen]), np.ones((2 * P, count), bool))
    output = jax.jit(functools.partial(model.apply, config=chosen, table=table))(params(chosen), inputs, tokens)
    assert (P, found.queries, found.documents) == (7, 7 * T, 4)
    for index, reads in enumerate(output.reads):
        keys = np.repeat(output.keys[index], chosen.heads // chosen.kv_heads, axis=2)
        weights = np.exp(np.einsum("atnh,acsnh->atncs", reads.queries[P:], keys[seen]))
        mass = weights[..., 0, :].sum(-1) / weights.sum((-1, -2))
        np.testing.assert_allclose(found.masses[-1][index], mass.mean((0, 1)), rtol=1e-4)


def test_of_one_context_the_mass_is_one():
    np.testing.assert_allclose(measure(contexts=(1,)).masses, 1, rtol=1e-6)


def test_an_untrained_model_is_near_one_over_d():
    # Tokens are drawn alike in all documents: contexts are exchangeable, and the mean over all tables is 1/d.
    alike = corpora.from_arrays(list(np.random.default_rng(1).integers(3, 64, (64, 2 * T))))
    found = measure(corpus=alike, query_windows=64)
    assert found.queries == 64 * T
    np.testing.assert_allclose(found.means, [1 / count for count in COUNTS], rtol=0.1)
    assert all(left > right for left, right in zip(found.means, found.means[1:], strict=False))


def test_the_order_of_negatives_does_not_matter(monkeypatch):
    usual, others = measure(contexts=(5,)), distraction.others
    monkeypatch.setattr(distraction, "others", lambda pairs, most: others(pairs, most)[:, [0, *range(most - 1, 0, -1)]])
    np.testing.assert_allclose(measure(contexts=(5,)).masses, usual.masses, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"batch_size": 3, "block": 7}, {"block": 1024}])
def test_what_bounds_memory_changes_nothing(changes):
    np.testing.assert_allclose(measure(**changes).masses, measure().masses, rtol=1e-5)


def test_sharded_equals_single_device():
    np.testing.assert_allclose(measure(on=mesh(4, 2)).masses, measure().masses, rtol=1e-5)
    with pytest.raises(ConfigError, match="evaluate.batch_size=3 must be a multiple of 2"):
        measure(on=mesh(4, 2), batch_size=3)


@pytest.mark.parametrize("most", [1, 4, 6])
def test_negatives_are_of_other_documents(most):
    pairs = distraction.choose(CORPUS, T, most, 4, seed=1)
    assert len(pairs) >= 4
    assert len(set(pairs)) == len(pairs)
    assert all(pair.start + 2 * T <= CORPUS.length(pair.document) for pair in pairs)
    for row, seen in enumerate(distraction.others(pairs, most)):
        assert seen[0] == row and len(set(seen)) == most
        assert all(pairs[other].document != pairs[row].document for other in seen[1:])


def test_too_few_documents_say_so():
    # 4 + 1 + 2 + 2 pairs in all: beside the four of the first document there are five.
    with pytest.raises(DataError, match="7 contexts want 6 windows of other documents, and there are 5"):
        distraction.choose(CORPUS, T, 7, 1, seed=0)
    with pytest.raises(DataError, match="there are 0"):
        distraction.choose(CORPUS, 100, 1, 1, seed=0)


def test_a_model_without_memory_layers_says_so():
    chosen = dataclasses.replace(MODEL, memory_layers=())
    with pytest.raises(ConfigError, match="memory_layers is empty"):
        measure(chosen)


MASSES = report.Masses(T, 5, 72, (1, 2), (2,), (((1.0, 1.0),), ((0.75, 0.5),)))


def test_results_survive_json(tmp_path):
    path = report.save({"a": MASSES}, {"a": {"step": 3}}, "held_out", tmp_path / "new")
    assert report.load(path) == {"a": MASSES}
    written = json.loads(path.read_text())["models"][0]
    assert (written["step"], written["means"]) == (3, [1.0, 0.625])
    with pytest.raises(UserError, match="can't read"):
        report.load(tmp_path / "no.json")
    (tmp_path / "other.json").write_text('{"models": [3]}')
    with pytest.raises(UserError, match="holds no results"):
        report.load(tmp_path / "other.json")


def test_tables_and_plot(tmp_path):
    results = {"a (d = 8)": MASSES, "b": dataclasses.replace(MASSES, contexts=(1, 4))}
    lines = report.table(results).splitlines()
    assert lines[1].split() == ["model", "1", "2", "4"]
    assert lines[2].split()[-2:] == ["1.000", "0.625"] and lines[-1].split() == ["1/d", "1.000", "0.500", "0.250"]
    assert report.head_table(results).splitlines()[3].split()[-4:] == ["2", "1", "1.000", "0.500"]
    report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_labels_tell_runs_apart():
    focused = dataclasses.replace(config(), crossbatch=config_lib.CrossbatchConfig(d=(1, 4), d_schedule="random"))
    found = report.labels({"runs/a/x": focused, "runs/b/x": config(), "runs/y/": config()})
    assert list(found.values()) == ["runs/a/x (d = 1, 4)", "runs/b/x (plain)", "y (plain)"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        command.main(["distraction", *map(str, words)])
    return caught.value.code


def test_the_command_compares_runs(workdirs, capsys):
    folder = workdirs
    assert run(f"--workdir={folder / 'focused'}", f"--against={folder / 'plain'}", f"--output={folder / 'out'}") == 0
    shown = capsys.readouterr().out
    assert "focused (d = 1): step 7" in shown and "1/d" in shown and "note:" not in shown
    found = report.load(folder / "out" / "distraction.json")
    assert list(found) == ["focused (d = 1)", "plain (plain)"]
    # The parameters are the same, and what crossbatch was in training doesn't matter.
    assert len({masses for masses in found.values()}) == 1
    assert (folder / "out" / "distraction.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workdir=/no/such/folder",), "no complete checkpoint in /no/such/folder"),
        (("--workdir={}/plain", "--against=/no/such/folder"), "no complete checkpoint in /no/such/folder"),
        (("--workdir={}/plain", "--split=test"), "--split=test is not one of train, held_out"),
        (("--workdir={}/plain", "--config.evaluate.contexts=1,9999"), "9999 contexts want 9998 windows"),
        (("--workdir={}/plain", "--config.evaluate.contexts=0,2"), "contexts=(0, 2) must be ascending"),
        (("--workdir={}/plain", "--config.model.memory_layers="), "plain: model.memory_layers is empty"),
    ],
)
def test_errors_of_the_command(workdirs, words, message, capsys):
    assert run(*(word.format(workdirs) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_share_is_what_the_layer_took_from_elsewhere(name):
    # Values of one token are ones and of the others zeros: what attention gives is the weight of the ones.
    block = layers.block_of(MODELS[name], jax.tree.map(lambda leaf: leaf[0], params(MODELS[name])["layers"]))
    key = jax.random.split(jax.random.key(1), 2)
    lse_local, lse_elsewhere = (jax.random.normal(each, (2, 3, 4)) for each in key)
    lse_elsewhere = lse_elsewhere.at[0, 0].set(-jnp.inf)
    ones = jnp.ones((2, 3, 4, 8))
    local = Partial(0 * ones, lse_local)
    remote = [Partial(jnp.where(lse_elsewhere[..., None] == -jnp.inf, 0.0, ones), lse_elsewhere)]
    share = block.attention.share(local, remote)
    np.testing.assert_allclose(share, block.attention.combine(local, remote)[..., 0], rtol=1e-6)
    assert (share[0, 0] == 0).all() and (share[0, 1] > 0).all()
    assert (block.attention.share(local, []) == 0).all()
