"""Evaluation: what a memory may and may not change, and the command line."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import memory, model, objective, sharding
from fot.attention import Tokens
from fot.checkpoint import Checkpointer
from fot.data import corpus as corpora
from fot.data import rows
from fot.errors import ConfigError, UserError
from fot.evaluate import __main__ as command
from fot.evaluate import perplexity
from fot.evaluate import perplexity_report as report
from fot.readers.reader import Reader
from fot.readers.table import READERS

T = 16
LENGTHS = (70, 17, 40, 33)  # tokens of the documents, bos and eos included
FILLED = 96  # most tokens that one of two rows reads: 6 windows
MODEL = config_lib.ModelConfig(
    vocab_size=64, layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, memory_layers=(1,), attention_block=16
)
LOG = lambda line: None  # noqa: E731


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    drawn = model.init(jax.random.key(0), MODEL)
    # Larger embeddings: predictions that are not flat, so that what a memory adds is seen.
    return {**drawn, "embedding": 6 * drawn["embedding"]}


def documents(lengths=LENGTHS, seed=0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 64, length) for length in lengths]


CORPUS = corpora.from_arrays(documents())


def config(**changes) -> config_lib.ExperimentConfig:
    """A config whose evaluation reads two documents side by side with dense attention."""
    defaults = {
        "memory": (0, 24),
        "readers": ("dense",),
        "modes": ("single_doc",),
        "neighbours": 8,
        "block": 16,
        "batch_size": 2,
        "position_bins": (16, 48),
    }
    return config_lib.ExperimentConfig(
        model=MODEL,
        crossbatch=config_lib.CrossbatchConfig(variant="none"),
        data=config_lib.DataConfig(context=T),
        evaluate=config_lib.EvaluateConfig(**{**defaults, **changes}),
    )


def evaluate(params, mesh, corpus=CORPUS, **changes) -> report.Results:
    return perplexity.evaluate(params, config(**changes), corpus, mesh, LOG)


def same(left: report.Column, right: report.Column) -> bool:
    """Whether two columns measured the same, but for the rounding of sums."""
    counts = [(part.start, part.stop, part.tokens) for part in left.positions]
    if counts != [(part.start, part.stop, part.tokens) for part in right.positions]:
        return False
    return np.allclose(nlls(left), nlls(right), atol=2e-5)


def nlls(column: report.Column) -> list[float]:
    return [column.nll, *(part.nll for part in column.positions)]


def test_without_memory_each_window_is_read_alone(params, mesh):
    found = evaluate(params, mesh).no_memory
    # Every window is a row, cut from the documents without `fot.data`.
    cuts = [(document, first) for document in documents() for first in range(0, len(document) - 1, T)]
    inputs, targets = np.zeros((2, len(cuts), T), np.int32)
    positions = np.full((len(cuts), T), -1)
    for row, (document, first) in enumerate(cuts):
        size = min(T, len(document) - 1 - first)
        inputs[row, :size] = document[first : first + size]
        targets[row, :size] = document[first + 1 : first + 1 + size]
        positions[row, :size] = first + np.arange(size)
    tokens = Tokens(np.zeros_like(inputs), np.broadcast_to(np.arange(T), inputs.shape))
    logits = jax.jit(lambda p: model.unembed(p, model.apply(p, inputs, tokens, MODEL).hidden, MODEL))(params)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    sums = [nll[(positions >= start) & (positions < stop)].sum() for start, stop in ((0, 16), (16, 48), (48, 999))]
    assert (found.mode, found.reader, found.memory, found.change) == ("none", "none", 0, 0.0)
    assert found.tokens == (positions >= 0).sum() == sum(LENGTHS) - len(LENGTHS)
    np.testing.assert_allclose(found.nll * found.tokens, sum(sums), rtol=1e-5)
    np.testing.assert_allclose([part.nll * part.tokens for part in found.positions], sums, rtol=1e-5)
    assert [(part.start, part.stop) for part in found.positions] == [(0, 16), (16, 48), (48, None)]


def test_memory_is_what_was_read_of_the_document(params, mesh):
    corpus = corpora.from_arrays(documents()[:1])
    reader = Reader("dense", 1, 24, True, 0.9, 4, 2)

    @jax.jit
    def read(held, batch):
        tokens = Tokens(batch.documents, batch.positions)
        output = model.apply(params, batch.tokens, tokens, MODEL, memory=held, reader=reader)
        nll, _ = objective.token_nll(params, output.hidden, batch.targets, MODEL)
        return memory.write(held, output.keys, output.values, tokens.documents), (nll * batch.weights).sum()

    held, total = memory.empty(1, 1, 24, MODEL.kv_heads, MODEL.head_dim, jnp.float32), 0.0
    for batch in rows.evaluation_batches(corpus, T, config(batch_size=1).evaluate):
        held, nll = read(held, batch)
        total += float(nll)
    found = evaluate(params, mesh, corpus, batch_size=1).columns[1]
    np.testing.assert_allclose(found.nll * found.tokens, total, rtol=1e-5)


def test_every_column_counts_the_same_targets_and_a_memory_matters(params, mesh):
    results = evaluate(params, mesh, memory=(0, 8, 24), readers=("dense", "knn"), modes=tuple(perplexity.MODES))
    assert len(results.columns) == 1 + 2 * 2 * 2
    counts = [[(part.start, part.tokens) for part in column.positions] for column in results.columns]
    assert all(each == counts[0] for each in counts)
    for column in results.columns[1:]:
        assert not np.isclose(column.nll, results.no_memory.nll, rtol=1e-5)
        assert np.isclose(column.change, 100 * (column.perplexity / results.no_memory.perplexity - 1))
    assert list(results.curves()) == [(mode, name) for mode in perplexity.MODES for name in ("dense", "knn")]
    assert results.main_curve() == ("single_doc", "dense")


def test_memory_does_not_reach_the_first_window_of_a_document(params, mesh):
    results = evaluate(params, mesh)
    assert np.isclose(results.columns[1].positions[0].nll, results.no_memory.positions[0].nll, rtol=1e-6)
    across = evaluate(params, mesh, modes=("multi_doc",), batch_size=1).columns[1]
    assert not np.isclose(across.positions[0].nll, results.no_memory.positions[0].nll, rtol=1e-6)


@pytest.mark.parametrize("reader", READERS)
def test_documents_side_by_side_do_not_matter(params, mesh, reader):
    one, two = (evaluate(params, mesh, batch_size=size, readers=(reader,)) for size in (1, 2))
    assert all(same(left, right) for left, right in zip(one.columns, two.columns, strict=True))


def test_the_order_of_documents_does_not_matter(params, mesh):
    backwards = evaluate(params, mesh, corpora.from_arrays(documents()[::-1]))
    there = evaluate(params, mesh)
    assert all(same(left, right) for left, right in zip(there.columns, backwards.columns, strict=True))


@pytest.mark.parametrize("mode", perplexity.MODES)
def test_more_memory_than_is_filled_changes_nothing(params, mesh, mode, monkeypatch):
    # Without the limit to what is filled, so that slots do stay empty.
    unlimited = perplexity.MODES[mode]._replace(fills=lambda document, row: 10**6)
    monkeypatch.setitem(perplexity.MODES, mode, unlimited)
    _, enough, plenty = evaluate(params, mesh, modes=(mode,), memory=(FILLED, 300)).columns
    assert same(enough, plenty)
    monkeypatch.undo()
    assert same(enough, evaluate(params, mesh, modes=(mode,), memory=(10**9,)).columns[1])


def test_the_longest_document_needs_no_more_memory_than_its_length(params, mesh):
    _, longest, more = evaluate(params, mesh, memory=(max(LENGTHS), 10 * max(LENGTHS))).columns
    assert nlls(longest) == nlls(more)
    assert longest.seconds == more.seconds  # one pass for both


def test_knn_of_all_entries_is_dense(params, mesh):
    _, dense, knn = evaluate(params, mesh, readers=("dense", "knn"), memory=(8,), modes=("multi_doc",)).columns
    assert (dense.reader, knn.reader) == ("dense", "knn")
    assert same(dense, knn)


@pytest.mark.parametrize("mode", perplexity.MODES)
@pytest.mark.parametrize("refresh", [T, 2 * T, 10**6])
def test_all_lists_of_a_growing_memory_are_all_entries(params, mesh, refresh, mode):
    """Built, refreshed, overwritten and cleared on the way; and never built."""
    changes = {"readers": ("dense", "clustered"), "neighbours": 24, "list_size": 4, "probes": 100, "refresh": refresh}
    _, dense, clustered = evaluate(params, mesh, modes=(mode,), **changes).columns
    assert same(dense, clustered)


@pytest.mark.parametrize("reader", READERS)
def test_the_block_changes_nothing(params, mesh, reader):
    # 16 does not divide 24: the last block shares slots with the one before.
    small, whole = (evaluate(params, mesh, readers=(reader,), block=block).columns[1] for block in (16, 24))
    assert same(small, whole)


def test_of_one_document_multi_doc_is_single_doc(params, mesh):
    alone = corpora.from_arrays(documents()[:1])
    _, single, multi = evaluate(params, mesh, alone, modes=("single_doc", "multi_doc"), batch_size=1).columns
    assert same(single, multi)


def test_every_mode_of_the_config_is_there():
    assert tuple(perplexity.MODES) == config_lib.MEMORY_MODES


def test_an_overflow_can_be_refused(params, mesh):
    refused = evaluate(params, mesh, memory=(69,), overflow="refuse")
    assert same(refused.columns[1], evaluate(params, mesh, memory=(69,)).columns[1])
    with pytest.raises(UserError, match="would have 64 memory entries but has room for 60: raise evaluate.memory"):
        evaluate(params, mesh, memory=(60,), overflow="refuse")


def test_max_documents_and_max_tokens(params, mesh):
    column = evaluate(params, mesh, max_documents=2, max_tokens=20).columns[1]
    assert column.tokens == 20 + 16


def test_without_memory_layers_only_no_memory_is_measured(mesh):
    plain = dataclasses.replace(config(), model=dataclasses.replace(MODEL, memory_layers=()))
    results = perplexity.evaluate(model.init(jax.random.key(0), plain.model), plain, CORPUS, mesh, LOG)
    assert [column.memory for column in results.columns] == [0]
    assert results.main_curve() == ("none", "none")
    assert "targets" in report.position_table(results)
    assert "none" in report.table(results)


@pytest.mark.parametrize(
    ("reader", "sizes"),
    [("knn", {"tensor": 2}), ("clustered", {"tensor": 2}), ("host", {"tensor": 2}), ("sharded_knn", {"sequence": 2})],
)
def test_sharded_equals_single_device(params, mesh, reader, sizes):
    devices = sharding.make_mesh(config_lib.MeshConfig(**sizes), jax.devices()[:4])
    single, sharded = (
        evaluate(params, each, readers=(reader,), list_size=4, probes=3, refresh=T) for each in (mesh, devices)
    )
    assert all(same(left, right) for left, right in zip(single.columns, sharded.columns, strict=True))
    with pytest.raises(ConfigError, match="evaluate.batch_size=3 must be a multiple of 2"):
        evaluate(params, devices, batch_size=3)


def test_results_survive_json(params, mesh, tmp_path):
    results = evaluate(params, mesh)
    path = report.save(results, {"step": 3}, tmp_path / "new")
    assert report.load(path) == results
    values = json.loads(path.read_text())
    assert values["step"] == 3
    assert np.isclose(values["columns"][1]["perplexity"], np.exp(results.columns[1].nll))
    assert [each.name for each in path.parent.iterdir()] == ["perplexity.json"]
    lost = dataclasses.replace(results.no_memory, nll=float("nan"), seconds=1.0)
    report.save(report.Results(T, (lost,)), {}, tmp_path)
    assert np.isnan(report.load(tmp_path / "perplexity.json").no_memory.nll)


def test_errors_of_files(tmp_path):
    with pytest.raises(UserError, match="can't read"):
        report.load(tmp_path / "no.json")
    (tmp_path / "other.json").write_text('{"loss": 3}')
    with pytest.raises(UserError, match="holds no results"):
        report.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="can't write"):
        report.save(report.Results(T, ()), {}, tmp_path / "other.json")


def made_up(scale: float, readers=("dense", "knn")) -> report.Results:
    """Results as a run gives them, without a run."""
    columns = [("none", "none", 0)] + [(m, r, n) for m in perplexity.MODES for r in readers for n in (256, 16384)]
    bins = ((0, 128), (128, 2048), (2048, None))

    def column(mode, reader, length):
        nll = scale - 0.01 * np.log1p(length)
        parts = tuple(report.Bin(start, stop, 1000, nll - 0.1 * i) for i, (start, stop) in enumerate(bins))
        return report.Column(mode, reader, length, 3000, nll, 100 * (np.exp(nll - scale) - 1), 1.0, parts)

    return report.Results(128, tuple(column(*each) for each in columns))


def test_tables():
    lines = report.table(made_up(2.0, READERS)).splitlines()
    assert len(lines) == 2 + len(perplexity.MODES) * len(READERS)
    assert lines[1].split() == ["mode", "reader", "0", "256", "16,384"]
    assert lines[2].split() == ["single_doc", "dense", "7.389", "6.990", "(-5.4%)", "6.706", "(-9.2%)"]
    assert len({len(line) for line in lines[1:]}) == 1
    lines = report.position_table(made_up(2.0)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["position", "0-127", "128-2,047", "from"]


def test_plot(tmp_path):
    plain = dataclasses.replace(made_up(2.3), columns=made_up(2.3).columns[:1])
    report.plot({"FoT": made_up(2.0, READERS), "plain": made_up(2.2), "none": plain}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report.plot({"plain": plain}, tmp_path / "plain.png")
    assert (tmp_path / "plain.png").stat().st_size > 1000


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    return caught.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the first argument must name an evaluation: perplexity"),
        (("--workdir=x",), "the first argument must name an evaluation: perplexity"),
        (("perplexty",), "unknown evaluation 'perplexty'; did you mean 'perplexity'?"),
        (("zebra",), "unknown evaluation 'zebra'; choose from perplexity"),
        (("perplexity",), "flag --workdir is required"),
        (("perplexity", "--workdir=/no/such/folder"), "no complete checkpoint in /no/such/folder/checkpoints"),
        (("perplexity", "--config=configs/code_tiny.py", "--workdir=x", "--split=test"), "--split=test is not one of"),
    ],
)
def test_errors_of_the_command(words, message, capsys):
    assert exit_code(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1


def test_help_of_the_command(capsys):
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    assert "  Perplexity on held-out documents by memory length" in shown
    assert all(f"\n  {name} " in shown for name in command.EVALUATIONS)
    assert exit_code("perplexity", "--help") == 0
    shown = capsys.readouterr().out
    assert "--workdir  (str, required)" in shown and "--config.evaluate.memory=" in shown


def test_as_a_process(tmp_path):
    text = "".join(f"word{number % 17} and line {number}\n" for number in range(40))
    for number in range(24):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n{text}")
    run = config(memory=(0, 32), batch_size=2, max_documents=2, max_tokens=64)
    data = dataclasses.replace(
        run.data,
        task=("files",),
        files=(f"{tmp_path}/*.txt",),
        tokenizer="bytes",
        min_document_tokens=(32,),
        held_out_fraction=0.5,
        cache_dir=str(tmp_path / "cache"),
    )
    run = dataclasses.replace(run, data=data, model=dataclasses.replace(MODEL, vocab_size=512))
    params = model.init(jax.random.key(0), run.model)
    with Checkpointer(tmp_path / "run" / "checkpoints", run.train) as checkpoints:
        checkpoints.save(7, {"params": params}, {}, run)
    words = ["perplexity", f"--workdir={tmp_path / 'run'}", "--config.evaluate.memory=16"]
    done = subprocess.run(
        [sys.executable, "-m", "fot.evaluate", *words],
        env={"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Perplexity by memory length in tokens" in done.stdout
    assert [column.memory for column in report.load(tmp_path / "run" / "perplexity.json").columns] == [0, 16]
    values = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    assert (values["step"], values["config"]["data"]["context"]) == (7, T)
    assert (tmp_path / "run" / "perplexity.png").exists()
