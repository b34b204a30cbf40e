"""Retrieval inspector: its scores are those of the softmax, its tokens those of the text, and its page stands alone."""

import dataclasses
import functools
import html.parser
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from fot import attention, model, sharding
from fot import config as config_lib
from fot.attention import Tokens
from fot.crossbatch import Table
from fot.data import corpus as corpora
from fot.data import tokenizer as tokenizers
from fot.errors import ConfigError, DataError, UserError
from fot.evaluate import __main__ as command
from fot.evaluate import perplexity, retrieval
from fot.evaluate import retrieval_report as report
from fot.evaluate.pieces import pieces

T = 8
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
DOCUMENT = np.random.default_rng(0).integers(3, 64, 5 * T + 4)
INPUTS = len(DOCUMENT) - 1


def config(chosen: config_lib.ModelConfig = MODEL, **changes) -> config_lib.ExperimentConfig:
    defaults = {"memory": (0, 999), "readers": ("dense",), "neighbours": 99, "block": 16, "retrieved": 5}
    return config_lib.ExperimentConfig(
        model=chosen,
        crossbatch=config_lib.CrossbatchConfig(variant="none"),
        data=config_lib.DataConfig(context=T),
        evaluate=config_lib.EvaluateConfig(**{**defaults, "modes": ("single_doc",), **changes}),
    )


@functools.cache
def mesh(devices: int = 1, tensor: int = 1):
    return sharding.make_mesh(config_lib.MeshConfig(tensor=tensor), jax.devices()[:devices])


@functools.cache
def params(chosen: config_lib.ModelConfig) -> model.Params:
    drawn = jax.jit(lambda key: model.init(key, chosen))(jax.random.key(0))
    return {**drawn, "embedding": 6 * drawn["embedding"]}


def inspect(positions=(), chosen=MODEL, on=None, **changes) -> tuple[report.Query, ...]:
    return retrieval.inspect(params(chosen), config(chosen, **changes), DOCUMENT, positions, on or mesh())


@functools.cache
def windows_as_rows(chosen: config_lib.ModelConfig) -> model.Output:
    """The document's windows side by side, each of which sees all that came before by a crossbatch table."""
    W = -(-INPUTS // T)
    inputs = np.pad(DOCUMENT[:-1], (0, W * T - INPUTS)).reshape(W, T)
    positions = np.arange(W * T).reshape(W, T)
    tokens = Tokens(np.where(positions < INPUTS, 0, -1), positions)
    earlier = np.arange(W)[None, :] < np.arange(W)[:, None]
    table = Table(np.where(earlier, np.arange(W), -1).astype(np.int32), np.zeros((W, W), bool))
    return jax.jit(functools.partial(model.apply, config=chosen, table=table))(params(chosen), inputs, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_softmax(name):
    chosen, position, window = MODELS[name], 4 * T + 3, 4
    (query,) = inspect((position,), chosen)
    output = windows_as_rows(chosen)
    assert [(head.layer, head.head) for head in query.heads] == [(i, n) for i in (0, 1) for n in range(4)]
    for head in query.heads:
        q = np.asarray(output.reads[head.layer].queries[window, 3, head.head])
        keys = np.asarray(output.keys[head.layer][:, :, head.head // 2])
        scores = (keys[:window] @ q).reshape(-1)
        here = output.keys[head.layer][window : window + 1]
        if chosen.memory_positions == "zero":
            here = attention.rope(here, np.arange(T)[None], chosen.rope_theta)
        local = np.asarray(here)[0, :4, head.head // 2] @ q
        weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(local).sum())
        if chosen.memory_gate:
            weights = np.exp(scores) / np.exp(scores).sum() / 2  # the gate begins at 0: half and half
        best = np.argsort(-scores)[:5]
        assert [entry.position for entry in head.entries] == best.tolist()
        np.testing.assert_allclose([entry.score for entry in head.entries], scores[best], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([entry.focus for entry in head.entries], weights[best], rtol=1e-4)
        np.testing.assert_allclose(head.share, weights.sum(), rtol=1e-4)


def test_focus_over_all_that_a_reader_retrieved_is_the_share():
    (query,) = inspect((4 * T,), readers=("knn",), neighbours=6, retrieved=50)
    for head in query.heads:
        assert len(head.entries) == 6
        np.testing.assert_allclose(sum(entry.focus for entry in head.entries), head.share, rtol=1e-5)


def test_losses_are_those_of_perplexity():
    queries = inspect(tuple(range(INPUTS)))
    results = perplexity.evaluate(params(MODEL), config(batch_size=1), corpora.from_arrays([DOCUMENT]), mesh(), print)
    np.testing.assert_allclose(np.mean([query.loss for query in queries]), results.columns[1].nll, rtol=1e-5)
    np.testing.assert_allclose(np.mean([query.loss_without for query in queries]), results.no_memory.nll, rtol=1e-5)
    # In the first window there is nothing in memory yet.
    for query in queries[:T]:
        assert query.loss == query.loss_without
        assert all(head.entries == () and head.share == 0 for head in query.heads)
    helped = sorted(queries[T:], key=lambda query: query.loss - query.loss_without)
    assert [query.position for query in inspect(inspected=3)] == [query.position for query in helped[:3]]


def test_a_full_memory_holds_the_latest_tokens():
    positions = (3 * T, 5 * T + 1)
    for query, every in zip(
        inspect(positions, memory=(10,), retrieved=50), inspect(positions, retrieved=50), strict=True
    ):
        first = query.position // T * T
        for head, without_end in zip(query.heads, every.heads, strict=True):
            assert {entry.position for entry in head.entries} == set(range(first - 10, first))
            if head.layer > 0:  # whose keys depend on what the first layer found in memory
                continue
            scores = {entry.position: entry.score for entry in without_end.entries}
            for entry in head.entries:
                np.testing.assert_allclose(entry.score, scores[entry.position], rtol=1e-5, atol=1e-6)


def test_sharded_equals_single_device():
    single, sharded = (inspect((20, 9), on=on) for on in (mesh(), mesh(4, 2)))
    assert [query.position for query in sharded] == [20, 9]
    for left, right in zip(single, sharded, strict=True):
        np.testing.assert_allclose(left[1:3], right[1:3], rtol=1e-5)
        for one, other in zip(left.heads, right.heads, strict=True):
            np.testing.assert_allclose(one.entries, other.entries, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "changes", "kind", "message"),
    [
        ((3, INPUTS), {}, DataError, f"position {INPUTS} is outside of the document: choose from 0 to {INPUTS - 1}"),
        ((-1,), {}, DataError, "position -1 is outside"),
        ((), {"max_tokens": T}, DataError, "8 tokens fit into one window"),
        ((3,), {"memory": (0,)}, ConfigError, "no length above 0"),
        ((3,), {"readers": ()}, ConfigError, "evaluate.readers is empty"),
        ((3,), {"chosen": dataclasses.replace(MODEL, memory_layers=())}, ConfigError, "memory_layers is empty"),
    ],
)
def test_errors(positions, changes, kind, message):
    with pytest.raises(kind, match=message):
        inspect(positions, **changes)


# Tokens as text.

TEXTS = ("  def f(x):\n\treturn 'é'  # 日本 🙂\n", "a\ufffdb", "🙂é", "plain")


@functools.cache
def tokenizer(name: str) -> tokenizers.Tokenizer:
    if name == "bytes":
        return tokenizers.byte_tokenizer(config().data, MODEL)
    settings = {**tokenizers.TRAINING_SETTINGS, "vocab_size": 300}
    if name == "spaced":  # as LLaMA's: a space before the text, which decoding takes off
        settings |= {"add_dummy_prefix": True}
    return tokenizers._sentencepiece(tokenizers._train(["plain def return (x)" * 9] * 9, settings), name)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["bytes", "trained", "spaced"])
def test_pieces_make_up_the_text_from_wherever_they_are_cut(name, text):
    chosen = tokenizer(name)
    ids = np.array([chosen.bos, *chosen.encode(text), chosen.eos])
    whole = pieces(chosen, ids, 0, len(ids))
    assert len(whole) == len(ids)
    assert (whole[0].text, whole[-1].text) == ("<bos>", "<eos>") and whole[0].named and whole[-1].named
    content = b"".join(
        bytes.fromhex("".join(re.findall("^<0x(..)>$", piece.text))) if piece.named else piece.text.encode()
        for piece in whole[1:-1]
    )
    assert content.decode() in (text, " " + text)
    if "\ufffd" not in text:  # which may be a character or the sign of a broken one, as the neighbours have it
        for start in range(len(ids)):
            assert pieces(chosen, ids, start, len(ids))[1:] == whole[start + 1 :]
            assert pieces(chosen, ids, start, start + 1) == whole[start : start + 1]


# The page.


class Parser(html.parser.HTMLParser):
    """Collects text and what could load anything; fails on tags that don't close in order."""

    VOID = ("meta",)

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


TEXT = "<script>alert('x')</script> & \"quotes\" <b>é</b>\n" * 3


@functools.cache
def page() -> report.Page:
    document = np.array([1, *tokenizer("bytes").encode(TEXT), 2])
    chosen = dataclasses.replace(MODEL, vocab_size=300)
    queries = retrieval.inspect(params(chosen), config(chosen), document, (4, 60, len(document) - 2), mesh())
    return report.Page("a < b & c: <document>", "dense", 999, document, queries, 6)


def test_the_page_is_well_formed_and_loads_nothing():
    parser = Parser(report.as_html(page(), tokenizer("bytes")))
    assert set(parser.seen) <= {*"html head meta title style body h1 h2 p section div table thead tbody".split()} | {
        *"tr th td span i mark meter".split()
    }
    assert set(parser.attributes) <= {
        "lang",
        "charset",
        "name",
        "content",
        "id",
        "class",
        "min",
        "max",
        "value",
        "colspan",
    }
    assert "url(" not in report.as_html(page(), tokenizer("bytes"))


def test_the_page_and_the_text_are_complete():
    shown = "".join(Parser(report.as_html(page(), tokenizer("bytes"))).texts)
    text = report.as_text(page(), tokenizer("bytes"))
    assert shown.count("the memory is empty") == text.count("the memory is empty") == 8
    for query in page().queries:
        assert f"token {query.position}: loss" in shown and f"token {query.position}: loss" in text
        for entry in (entry for head in query.heads for entry in head.entries):
            around = pieces(tokenizer("bytes"), page().document, max(entry.position - 6, 0), entry.position + 7)
            passage = "".join(piece.text for piece in around).replace("\n", "⏎")
            assert passage in shown and f"{entry.focus:.3f}" in shown and f"{entry.score:.2f}" in shown
            assert passage in re.sub("[⟦⟧]", "", text) and f"{entry.score:.2f}" in text


def test_the_page_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here: install Debian's package chromium to see the page in a browser")
    path = report.save(page(), tokenizer("bytes"), tmp_path)
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    seen = Parser(done.stdout)
    written = Parser(path.read_text())
    assert seen.seen == written.seen  # the browser had nothing to mend, and no script came alive
    assert "".join("".join(seen.texts).split()) == "".join("".join(written.texts).split())


# The command.


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        command.main(["retrieval", *words])
    return caught.value.code


def test_the_command(workdirs, capsys, tmp_path):
    assert run(f"--workdir={workdirs / 'focused'}", f"--output={tmp_path}", "--config.evaluate.inspected=2") == 0
    shown = capsys.readouterr().out
    assert shown.count(": loss of the next token") == 2 and "kNN score" in shown
    parser = Parser((tmp_path / "retrieval.html").read_text())
    assert parser.seen.count("section") == 2 and parser.seen.count("h1") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workdir=/no/such/folder",), "no complete checkpoint in /no/such/folder"),
        (("--split=test",), "--split=test is not one of train, held_out"),
        (("--document=1.tx",), "--document=1.tx is no document of the held_out split; the nearest name is '"),
        (("--document=99",), "numbers go from 0 to"),
        (("--document=0", "--positions=9999"), ".txt: position 9999 is outside of the document: choose from 0 to"),
        (("--positions=1,x",), "--positions=1,x"),
        (("--positions=1.5",), "must be numbers of tokens"),
        (("--config.model.memory_layers=",), "model.memory_layers is empty"),
        (("--config.evaluate.max_tokens=8",), "name a longer document"),
    ],
)
def test_errors_of_the_command(workdirs, words, message, capsys):
    assert run(f"--workdir={workdirs / 'plain'}", *words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_documents_are_found_by_name_then_by_number():
    corpus = corpora.from_arrays([np.arange(3, 3 + length) for length in (5, 9, 7)])
    part = corpus.parts[0]
    names = b"a.py20"
    corpus = corpora.Corpus(
        (part._replace(names=np.frombuffer(names, np.uint8), name_offsets=np.array([0, 4, 5, 6], np.int64)),)
    )
    assert [corpus.name(number) for number in range(3)] == ["a.py", "2", "0"]
    found = [retrieval.find_document(corpus, wanted, "held_out") for wanted in ("", "a.py", "2", "0", "1")]
    assert found == [1, 0, 1, 2, 1]
    with pytest.raises(UserError, match="nearest name is 'a.py'"):
        retrieval.find_document(corpus, "b.py", "held_out")
