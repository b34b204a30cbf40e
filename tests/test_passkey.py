"""Properties of passkey prompts, for any tokenizer, and of the documents that a model learns them from."""

import dataclasses
import re

import numpy as np
import pytest

from fot import metrics, train
from fot.config import (
    CrossbatchConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PasskeyConfig,
    TrainConfig,
)
from fot.data import corpus, mixture, passkey, rows, tasks, tokenizer
from fot.data import endless as endless_documents
from fot.data.endless import Endless
from fot.errors import ConfigError, DataError
from tests.hosts import check_that_hosts_read_alike

SETTINGS = {
    "one length": dict(),
    "phases": dict(tokens=(110, 192), phase_steps=(2,), documents_per_key=(1, 4)),
    "one digit": dict(digits=1, tokens=(150,)),
}


def experiment(packs=4, seed=0, **settings) -> ExperimentConfig:
    fields = PasskeyConfig(**{"document": 192, "tokens": (192,), **settings})
    return ExperimentConfig(
        model=ModelConfig(vocab_size=64),
        crossbatch=CrossbatchConfig(packing=fields.document // 48, w=fields.document // 48 - 1),
        data=DataConfig(task=("passkey",), context=48, batch_size=packs * fields.document // 48, seed=seed),
        passkey=fields,
    )


def part(split="train", **settings) -> Endless:
    [only] = corpus.load(experiment(**settings), split).corpus.parts
    return only


def document(endless, number) -> np.ndarray:
    return endless.read(number, 0, endless.length(number))


WORDS = passkey.tokenizer(experiment())


def parsed(text) -> tuple[str, int, int]:
    """Returns the key of a whole prompt and how many sentences come before and after it, read from the text alone."""
    first = re.findall(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.", text)
    [(key, again)] = first
    assert key == again and len(re.findall(r"\d+", text)) == 2
    begin, end = text.split(passkey.KEY.format(key=key))
    assert begin.startswith(passkey.TASK + "\n") and end.endswith("\n" + passkey.QUESTION)
    counts = []
    for filler in (begin.removeprefix(passkey.TASK).strip(), end.removesuffix(passkey.QUESTION).strip()):
        sentences = re.findall(r"[^.]+\.", filler)
        whole = " ".join(passkey.FILLER) + " "
        assert filler == (whole * (len(sentences) // 5 + 1))[: len(filler)]
        counts.append(len(sentences))
    return key, *counts


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, tokenizer.Tokenizer]:
    folder = tmp_path_factory.mktemp("documents")
    for number in range(4):
        (folder / f"{number}.txt").write_text(passkey.text("9081726354", 9 + number, 3))
    data = DataConfig(task=("files",), files=(f"{folder}/*.txt",), cache_dir=f"{folder}/cache", held_out_fraction=0.01)
    model = ModelConfig(vocab_size=330)
    return {
        "words": WORDS,
        "bytes": tokenizer.byte_tokenizer(data, model),
        "sentencepiece": tokenizer.trained_tokenizer(data, model),
    }


@pytest.mark.parametrize("name", ["words", "bytes", "sentencepiece"])
@pytest.mark.parametrize("length", [450, 1000, 5001])
def test_a_prompt_fills_its_length_to_within_a_sentence(name, length, encoders):
    encoder = encoders[name]
    longest = max(len(encoder.encode(" " + sentence)) for sentence in passkey.FILLER) + 1
    for depth in (0.0, 0.1, 0.5, 0.93, 1.0):
        for key in passkey.keys(2, 5, 7):
            found = passkey.prompt(encoder, key, length, depth)
            assert length - longest < len(found.tokens) <= length
            assert found.key == key and found.tokens.dtype == np.int32
            assert found.tokens[0] == encoder.bos and encoder.bos not in found.tokens[1:]
            inside, before, after = parsed(encoder.decode(found.tokens.tolist()))
            assert inside == key and before == round(depth * (before + after))


def test_every_place_of_the_key_is_reached():
    sentences = sum(parsed(WORDS.decode(passkey.prompt(WORDS, "12345", 300, 0.0).tokens))[1:])
    places = set()
    for number in range(4 * sentences + 1):
        found = passkey.prompt(WORDS, "12345", 300, number / (4 * sentences))
        places.add(parsed(WORDS.decode(found.tokens))[1])
    assert places == set(range(sentences + 1))


@pytest.mark.parametrize("name", ["words", "bytes", "sentencepiece"])
def test_a_prompt_without_room_says_how_much_it_needs(name, encoders):
    with pytest.raises(ConfigError, match=r"prompt of 5 tokens has no room for filler: ask for \d+ or more") as error:
        passkey.prompt(encoders[name], "12345", 5, 0.5)
    least = int(re.findall(r"\d+", str(error.value))[1])
    assert len(passkey.prompt(encoders[name], "12345", least, 0.5).tokens) == least
    with pytest.raises(ConfigError):
        passkey.prompt(encoders[name], "12345", least - 1, 0.5)


def test_keys_are_those_of_their_seed():
    many = passkey.keys(500, 5, 1, 2)
    assert many == passkey.keys(500, 5, 1, 2) and many[:9] == passkey.keys(9, 5, 1, 2) != passkey.keys(9, 5, 1, 3)
    assert all(re.fullmatch(r"[1-9]\d{4}", key) for key in many) and len(set(many)) > 490
    assert set("".join(many)) == set("0123456789")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345.", True),
        ("12345", True),
        ("\n12345 is", True),
        (" 123456.", False),
        (" 1234.", False),
        (" 12 345", False),
        (" key 12345", False),
        ("", False),
    ],
)
def test_an_answer_is_compared_as_digits(answer, right):
    assert passkey.answered(answer, "12345") == right


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_a_document_hides_a_key_and_asks_for_it_in_its_last_row(settings, split):
    endless = part(split, **settings)
    config, ends, lengths = endless.recipe.config, set(), set()
    for number in range(40):
        phase = sum(number >= first for first in endless.recipe.firsts) - 1
        tokens, weights = document(endless, number), endless.weights(number, 0, config.document)
        [begin], [end] = (np.flatnonzero(tokens == mark) for mark in (passkey.BOS, passkey.EOS))
        assert (tokens[:begin] == passkey.PAD).all() and (tokens[end + 1 :] == passkey.PAD).all()
        assert passkey.PAD not in tokens[begin:end] and end - begin < config.tokens[phase]
        text = WORDS.decode(tokens[begin:end])
        if number % config.documents_per_key[phase]:
            assert not weights.any() and not re.search(r"\d|pass key", text)
            continue
        prompt, answer = re.fullmatch(r"(.*) (\d+)\.", text, re.DOTALL).groups()
        assert parsed(prompt)[0] == answer and len(answer) == config.digits
        counted = np.flatnonzero(weights)
        assert WORDS.decode(tokens[counted + 1]) == f" {answer}." and set(weights) == {0, 1}
        np.testing.assert_array_equal(counted, np.arange(end - config.digits - 3, end - 1))
        assert end - len(WORDS.encode(passkey.QUESTION)) - len(counted) >= config.document - endless.recipe.context
        ends.add(int(end))
        lengths.add(int(end - begin))
    assert len(ends) > 5 and (len(lengths) > 5 or settings)
    for start, stop in [(0, 7), (160, 190), (191, 192)]:
        np.testing.assert_array_equal(endless.read(39, start, stop), tokens[start:stop])
        np.testing.assert_array_equal(endless.weights(39, start, stop), weights[start:stop])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_document_is_a_function_of_its_seed_split_and_number(settings):
    endless = part(**settings)
    expected = [document(endless, number) for number in range(12)]
    endless_documents.made.cache_clear()
    again = part(**settings)
    assert again.key == endless.key
    for number in reversed(range(12)):
        np.testing.assert_array_equal(document(again, number), expected[number])
    others = [part(seed=1, **settings), part("held_out", **settings)]
    assert len({endless.key, *(other.key for other in others)}) == 3
    for other in others:
        assert sum((document(other, number) == expected[number]).all() for number in range(12)) == 0


def test_texts_grow_and_keys_become_rare_by_steps():
    settings = dict(tokens=(100, 150, 192), documents_per_key=(1, 1, 4), phase_steps=(6, 9))
    config = experiment(packs=8, **settings)
    stream = mixture.mix(corpus.load(config, "train").corpus, config.data)
    position, longest, keyed = rows.start(config), [], []
    for _ in range(12):
        batch, position = rows.next_batch(stream, position, config, range(8))
        documents = batch.tokens.reshape(8, -1)
        longest.append(int((documents != passkey.PAD).sum(1).max()))
        keyed.append(np.flatnonzero(batch.weights.reshape(8, -1).any(1)).tolist())
        assert not batch.weights.reshape(8, 4, -1)[:, :-1].any()
    assert max(longest[:6]) <= 100 < max(longest[6:9]) <= 150 < max(longest[9:])
    assert keyed == [list(range(8))] * 9 + [[0, 4]] * 3
    held_out = part("held_out", packs=8, **settings)
    assert (held_out.recipe.config.tokens, held_out.recipe.config.documents_per_key) == ((192,), (4,))


def test_each_host_reads_its_own_packs_alike(monkeypatch):
    check_that_hosts_read_alike(experiment(packs=8, **SETTINGS["phases"]), 32, monkeypatch)


def test_the_vocabulary_writes_and_reads_every_text():
    text = passkey.text("9081726354", 13, 6) + passkey.ANSWER.format(key="9081726354")
    assert WORDS.decode(WORDS.encode(text)) == text and WORDS.vocab_size <= 64
    assert WORDS.decode([passkey.BOS, 0, WORDS.vocab_size]) == ""
    with pytest.raises(DataError, match="'word' is no token"):
        WORDS.encode("word")
    small = dataclasses.replace(experiment(), model=ModelConfig(vocab_size=59))
    with pytest.raises(DataError, match="set model.vocab_size to 60"):
        corpus.load(small, "train")


WRONG = {
    "digits=0 must": dict(digits=0),
    "digits=19 must": dict(digits=19),
    "tokens=(64, 96) must have 1 entries": dict(tokens=(64, 96)),
    "documents_per_key=(1,) must have 2": dict(tokens=(64, 96), phase_steps=(3,)),
    "phase_steps=(3, 3)": dict(tokens=(64,) * 3, documents_per_key=(1,) * 3, phase_steps=(3, 3)),
    "tokens=(600,) must be at most document=512": dict(tokens=(600,)),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(text):
    with pytest.raises(ConfigError) as error:
        PasskeyConfig(**WRONG[text])
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("group", "fields", "text"),
    [
        ("data", dict(context=64), "data.context=64 × crossbatch.packing=4 must be passkey.document=192"),
        ("data", dict(packing="released"), "data.packing=released"),
        ("crossbatch", dict(d=(2,)), "at step 0 it is 1, which must be at least crossbatch.d, 2"),
        ("crossbatch", dict(d=(1, 2), d_schedule="steps", d_steps=(7,)), "at step 7 it is 1"),
        ("crossbatch", dict(d=(1, 2), d_schedule="accuracy"), "at step 0 it is 1"),
        ("passkey", dict(documents_per_key=(3,)), "divide the 4 documents of a group"),
    ],
)
def test_a_question_that_would_see_other_keys_and_a_pack_that_is_no_document_are_refused(group, fields, text):
    config = experiment()
    changed = dataclasses.replace(getattr(config, group), **fields)
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(config, **{group: changed})
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_text_or_a_question_without_room_is_refused():
    for settings, text in [(dict(tokens=(74,)), "text has 75 tokens without filler"), (dict(digits=18), "context=24")]:
        config = experiment(**settings)
        if "digits" in settings:
            data = dataclasses.replace(config.data, context=24, batch_size=16)
            config = dataclasses.replace(config, data=data, crossbatch=CrossbatchConfig(packing=8, w=7))
        with pytest.raises(ConfigError) as error:
            corpus.load(config, "train")
        assert text in str(error.value)
    with pytest.raises(ConfigError, match="can't be mixed"):
        DataConfig(task=("passkey", "python_stdlib"))


@pytest.mark.slow  # tests/test_dictionary.py has the same of its endless documents
def test_a_run_that_stops_and_goes_on_reads_what_the_whole_run_reads(tmp_path):
    """Through the phases of the documents and of d."""
    config = dataclasses.replace(
        experiment(packs=4, tokens=(110, 192), phase_steps=(3,), documents_per_key=(1, 2)),
        model=ModelConfig(
            vocab_size=60, layers=2, dim=16, heads=2, kv_heads=2, head_dim=8, mlp_dim=16, memory_layers=(1,)
        ),
        crossbatch=CrossbatchConfig(packing=4, w=3, d=(1, 2), d_schedule="steps", d_steps=(3,), loss_rows="last"),
        optimizer=OptimizerConfig(schedule="constant", learning_rate=1e-2, warmup_steps=1),
        mesh=MeshConfig(data=4, fsdp=1, tensor=2),
    )

    def run(folder, steps):
        settings = TrainConfig(steps=steps, log_every=1, evaluate_every=6, evaluate_batches=1)
        train.train(dataclasses.replace(config, train=settings), tmp_path / folder, lambda line: None)
        return metrics.read_metrics(tmp_path / folder / "metrics.jsonl")

    whole = run("whole", 6)
    run("parts", 4)
    parts = run("parts", 6)
    names = ("step", "loss", "accuracy", "d", "batch_checksum")
    left, right = ([[line[name] for name in names] for line in lines] for lines in (whole, parts))
    assert left == right
    assert [line["d"] for line in whole] == [1] * 3 + [2] * 3
    assert whole[-1]["held_out/loss_with_contexts"] == parts[-1]["held_out/loss_with_contexts"]
