"""Properties of the dictionary task: pure documents, keys all different, questions that the definitions answer."""

import dataclasses

import numpy as np
import pytest

from fot import metrics, train
from fot.config import (
    CrossbatchConfig,
    DataConfig,
    DictionaryConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from fot.data import corpus, dictionary, mixture, rows, tasks
from fot.data import endless as endless_documents
from fot.data.endless import Endless
from fot.errors import ConfigError, DataError
from tests.hosts import check_that_hosts_read_alike

SETTINGS = {
    "paper": dict(),
    "small": dict(symbols=9, key_tokens=2, value_tokens=1, document=64, window=32),
    "three windows": dict(symbols=20, key_tokens=3, value_tokens=2, document=96, window=32),
    "every key": dict(symbols=2, key_tokens=2, value_tokens=1, document=40, window=20),
    "few, again": dict(records=(3,)),
    "few, padded": dict(records=(3,), fill="pad"),
    "confusable": dict(confusable=0.6),
}


def experiment(packs=4, seed=0, **settings) -> ExperimentConfig:
    fields = DictionaryConfig(**settings)
    packing = fields.document // fields.window
    return ExperimentConfig(
        model=ModelConfig(vocab_size=64),
        crossbatch=CrossbatchConfig(packing=packing),
        data=DataConfig(task=("dictionary",), context=fields.window, batch_size=packs * packing, seed=seed),
        dictionary=fields,
    )


def part(split="train", **settings) -> Endless:
    [only] = corpus.load(experiment(**settings), split).corpus.parts
    return only


def document(endless, number) -> np.ndarray:
    return endless.read(number, 0, endless.length(number)).reshape(-1, endless.recipe.config.window)


def records(windows, config, mark) -> list[tuple[tuple, tuple]]:
    """Returns (key, value) of all records with that mark, read from the tokens alone."""
    found = []
    for window in windows:
        whole = window[: config.window_records * config.record_tokens].reshape(-1, config.record_tokens)
        assert (window[whole.size :] == dictionary.PAD).all()
        for record in whole:
            if record[0] == mark:
                assert record[1 + config.key_tokens] == dictionary.VALUE
                found.append((tuple(record[1 : 1 + config.key_tokens]), tuple(record[2 + config.key_tokens :])))
                assert min(found[-1][0] + found[-1][1]) >= 4 and max(found[-1][0] + found[-1][1]) < 4 + config.symbols
            else:
                assert (record == dictionary.PAD).all()
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_question_has_one_definition_in_the_windows_before(settings, split):
    endless = part(split, **settings)
    config = endless.recipe.config
    room = config.window_records * (config.document // config.window - 1)
    count = config.records[0] or room
    for number in range(8):
        windows = document(endless, number)
        defined = records(windows[:-1], config, dictionary.KEY)
        asked = records(windows[-1:], config, dictionary.QUERY)
        meaning = dict(defined)
        assert len(meaning) == count == len(set(defined))  # each key has one value
        assert all(meaning[key] == value for key, value in asked)
        padded = config.fill == "pad"
        assert len(defined) == (count if padded else room)
        assert len(asked) == (min(count, config.window_records) if padded else config.window_records)
        assert len({key for key, _ in asked}) == min(count, len(asked))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_weights_are_on_values_that_were_asked_for_alone(settings):
    endless = part(**settings)
    config, length = endless.recipe.config, endless.recipe.config.document
    for number in range(3):
        tokens, weights = endless.read(number, 0, length), endless.weights(number, 0, length)
        targets = tokens[1:][weights[:-1] > 0].reshape(-1, config.value_tokens)
        asked = records(document(endless, number)[-1:], config, dictionary.QUERY)
        np.testing.assert_array_equal(targets, [value for _, value in asked])
        assert weights[-1] == 0 and not weights[: length - config.window - 1].any()
        for start, stop in [(0, 7), (length - 30, length - 11), (length - 1, length)]:
            np.testing.assert_array_equal(endless.read(number, start, stop), tokens[start:stop])
            np.testing.assert_array_equal(endless.weights(number, start, stop), weights[start:stop])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_document_is_a_function_of_its_seed_split_and_number(settings):
    endless = part(**settings)
    expected = [document(endless, number) for number in range(6)]
    endless_documents.made.cache_clear()
    again = part(**settings)
    assert again.key == endless.key
    for number in reversed(range(6)):
        np.testing.assert_array_equal(document(again, number), expected[number])
    others = [part(seed=1, **settings), part("held_out", **settings)]
    assert len({endless.key, *(other.key for other in others)}) == 3
    texts = [each.tobytes() for each in expected]
    for other in others:
        texts += [document(other, number).tobytes() for number in range(6)]
    assert len(set(texts)) == len(texts) or settings == SETTINGS["every key"]


@pytest.mark.parametrize("settings", [SETTINGS["small"], SETTINGS["every key"]], ids=str)
def test_a_dictionary_has_every_key_once(settings):
    config = DictionaryConfig(**settings)
    whole = dictionary.Dictionary(config, 3)
    windows = [whole.definitions(i) for i in range(whole.windows)]
    defined = records(windows, config, dictionary.KEY)
    assert len(dict(defined)) == len(defined) == whole.windows * config.window_records
    assert len(defined) > config.symbols**config.key_tokens - config.window_records
    other = dictionary.Dictionary(config, 4)
    assert [other.definitions(i).tolist() for i in range(whole.windows)] != [each.tolist() for each in windows]
    for count in (1, whole.windows):
        asked = [records([whole.questions(count, i)], config, dictionary.QUERY) for i in range(200)]
        known = dict(records(windows[:count], config, dictionary.KEY))
        for one in asked:
            assert len(dict(one)) == len(one) == config.window_records
            assert all(known[key] == value for key, value in one)
        assert {key for one in asked for key, _ in one} == set(known)  # all of it is asked for


def test_a_dictionary_of_sixteen_million_tokens_has_keys_enough():
    config = DictionaryConfig()
    whole = dictionary.Dictionary(config, 0)
    assert whole.windows * config.window > 16 * 2**20
    # Of windows far from each other, as numbers: shuffled places are different where places are.
    places = [
        np.array([key for key, _ in records([whole.definitions(i)], config, dictionary.KEY)])
        for i in range(0, 65536, 997)
    ]
    numbers = (np.concatenate(places) - 4) @ config.symbols ** np.arange(config.key_tokens)
    assert len(np.unique(numbers)) == len(numbers) == 66 * 25
    digits = np.bincount(np.concatenate(places).ravel() - 4, minlength=60)
    assert digits.min() > 60 and digits.max() < 170  # 110 each; 5 standard deviations


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_batch_has_definitions_in_the_first_rows_and_questions_in_the_last(settings):
    config = experiment(**settings)
    stream = mixture.mix(corpus.load(config, "train").corpus, config.data)
    packs, packing = rows.pack_count(config), config.crossbatch.packing
    position, seen = rows.start(config), []
    for _ in range(3):
        batch, position = rows.next_batch(stream, position, config, range(packs))
        for pack in range(packs):
            [number] = set(batch.documents[pack * packing : (pack + 1) * packing].ravel())
            windows = batch.tokens[pack * packing : (pack + 1) * packing]
            np.testing.assert_array_equal(windows, document(stream.corpus.parts[0], number))
            assert (windows[-1] != dictionary.KEY).all() and (windows[:-1] != dictionary.QUERY).all()
            seen.append(number)
        last = np.arange(len(batch.weights)) % packing == packing - 1
        assert batch.weights[last].any(axis=1).all() and not batch.weights[~last].any()
    assert seen == list(range(3 * packs))


def test_records_grow_by_steps_and_held_out_documents_are_the_last_phase():
    settings = dict(records=(2, 6, 0), records_steps=(3, 5))
    config = experiment(packs=4, **settings)
    stream = mixture.mix(corpus.load(config, "train").corpus, config.data)
    position, counts = rows.start(config), []
    for _ in range(7):
        batch, position = rows.next_batch(stream, position, config, range(4))
        found = {len(set(records(row[None], config.dictionary, dictionary.KEY))) for row in batch.tokens[::2]}
        counts.append(found)
    assert counts == [{2}] * 3 + [{6}] * 2 + [{25}] * 2
    held_out = part("held_out", packs=4, **settings)
    assert len(set(records(document(held_out, 0)[:1], held_out.recipe.config, dictionary.KEY))) == 25


def test_confusable_keys_differ_in_one_token_from_those_of_each_neighbour():
    share, neighbours = 0.4, 10
    endless = part(confusable=share, confusable_documents=neighbours, symbols=40)

    def keys(number):
        return np.array(
            [key for key, _ in records(document(endless, number)[:1], endless.recipe.config, dictionary.KEY)]
        )

    def near(left, right):
        """For each key of `left`, whether one of `right` has all but one token in common; never all of them."""
        same = (keys(left)[:, None] == keys(right)[None]).sum(-1)
        assert same.max() < endless.recipe.config.key_tokens
        return (same == endless.recipe.config.key_tokens - 1).any(1).sum()

    wanted = round(share * 25)
    for number in range(3 * neighbours, 4 * neighbours):
        for other in range(3 * neighbours, 4 * neighbours):
            if other != number:
                assert wanted <= near(number, other) <= wanted + 2
        assert near(number, 4 * neighbours) <= 1 and near(number, 3 * neighbours - 1) <= 1


def test_each_host_reads_its_own_packs_alike(monkeypatch):
    config = experiment(packs=8, confusable=0.3, records=(4, 0), records_steps=(2,))
    check_that_hosts_read_alike(config, 16, monkeypatch)


def test_the_vocabulary_writes_and_reads_tokens():
    tokenizer = corpus.load(experiment(), "train").tokenizer
    tokens = document(part(), 0).ravel()
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)
    assert tokenizer.decode(tokens[:2]).startswith("<k> ") and tokenizer.vocab_size == 64
    with pytest.raises(DataError, match="'word' is no token"):
        tokenizer.encode("<k> word")


WRONG = {
    "record of 10": dict(window=9, document=18),
    "multiple of window": dict(window=100, document=250),
    "records=(26,)": dict(records=(26,)),
    "records_steps=()": dict(records=(6, 0)),
    "keys but a document defines": dict(symbols=2),
    "confusable=1.5": dict(confusable=1.5),
    "confusable_documents=61": dict(confusable=0.1, confusable_documents=61),
    "fill='repeated'": dict(fill="repeated"),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(text):
    with pytest.raises(ConfigError) as error:
        DictionaryConfig(**WRONG[text])
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_pack_that_is_no_document_and_a_vocabulary_too_small_are_refused():
    config = experiment()
    for group, fields, text in [
        ("data", dict(context=128), "data.context=128 × crossbatch.packing=2"),
        ("model", dict(vocab_size=63), "model.vocab_size=63"),
    ]:
        changed = dataclasses.replace(getattr(config, group), **fields)
        with pytest.raises(ConfigError) as error:
            dataclasses.replace(config, **{group: changed})
        assert text in str(error.value)
    with pytest.raises(ConfigError, match="can't be mixed"):
        DataConfig(task=("dictionary", "python_stdlib"))


@pytest.mark.slow
def test_a_run_that_stops_and_goes_on_reads_what_the_whole_run_reads(tmp_path):
    """Through a phase of records, and with a d that grows by accuracy, but not before its time."""
    small = experiment(
        records=(1, 0), records_steps=(3,), symbols=2, key_tokens=2, value_tokens=1, document=20, window=10
    )
    config = dataclasses.replace(
        small,
        model=ModelConfig(
            vocab_size=8, layers=2, dim=16, heads=2, kv_heads=2, head_dim=8, mlp_dim=16, memory_layers=(1,)
        ),
        crossbatch=CrossbatchConfig(d=(1, 2), d_schedule="accuracy", d_accuracy=0.01, d_after=5, loss_rows="last"),
        optimizer=OptimizerConfig(schedule="constant", learning_rate=1e-2, warmup_steps=1),
        mesh=MeshConfig(data=8, fsdp=1),
    )

    def run(folder, steps):
        settings = TrainConfig(steps=steps, log_every=1, evaluate_every=8, evaluate_batches=1)
        train.train(dataclasses.replace(config, train=settings), tmp_path / folder, lambda line: None)
        return metrics.read_metrics(tmp_path / folder / "metrics.jsonl")

    whole = run("whole", 8)
    run("parts", 6)
    parts = run("parts", 8)
    names = ("step", "loss", "accuracy", "d", "batch_checksum")
    left, right = ([[line[name] for name in names] for line in lines] for lines in (whole, parts))
    assert left == right
    assert [line["d"] for line in whole] == [1] * 6 + [2] * 2
    assert whole[-1]["held_out/loss_with_contexts"] == parts[-1]["held_out/loss_with_contexts"]
    assert 0 <= whole[-1]["held_out/accuracy_with_contexts"] == parts[-1]["held_out/accuracy_with_contexts"] <= 1
