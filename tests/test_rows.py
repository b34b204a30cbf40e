import dataclasses
import json

import numpy as np
import pytest

from fot.config import CrossbatchConfig, DataConfig, EvaluateConfig, ExperimentConfig
from fot.data import corpus, mixture, permutation, rows
from fot.errors import DataError

CONTEXT = 8
LENGTHS = [2, 3, 8, 9, 16, 17, 24, 40, 100, 5, 33]


def config(packs=4, packing=2, seed=0, context=CONTEXT):
    return ExperimentConfig(
        crossbatch=CrossbatchConfig(variant="none", packing=packing),
        data=DataConfig(batch_size=packs * packing, context=context, seed=seed),
    )


@pytest.fixture(scope="module")
def documents():
    """Documents in which no token occurs twice, but for bos=1 and eos=2."""
    ends = np.cumsum(LENGTHS)
    inner = [np.arange(end - n, end) + 10 for end, n in zip(ends, LENGTHS, strict=True)]
    return corpus.from_arrays([np.concatenate([[1], ids[1:-1], [2]]) for ids in inner])


def batches(documents, values, count, position=None, packs=None):
    stream = mixture.mix(documents, values.data)
    position = rows.start(values) if position is None else position
    packs = range(rows.pack_count(values)) if packs is None else packs
    for _ in range(count):
        batch, position = rows.next_batch(stream, position, values, packs)
        yield batch, position


def streams(documents, values, count):
    """Returns every field as [packs, tokens]: K rows of each step, step after step."""
    packs = rows.pack_count(values)
    parts = [[field.reshape(packs, -1) for field in batch] for batch, _ in batches(documents, values, count)]
    return rows.Batch(*(np.concatenate(field, axis=1) for field in zip(*parts, strict=True)))


def assert_same(left, right):
    for name, a, b in zip(rows.Batch._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype


SHAPES = pytest.mark.parametrize(("packs", "packing"), [(1, 1), (4, 2), (3, 4), (16, 1)])


@SHAPES
def test_flattened_pack_is_its_documents_in_order(documents, packs, packing):
    values = config(packs, packing)
    stream = streams(documents, values, 20)
    for pack in range(packs):
        ordinals = range(pack, pack + packs * 400, packs)
        order = mixture.mix(documents, values.data)
        indices = [order.document_at(o) for o in ordinals]
        tokens = np.concatenate([documents.document(i) for i in indices])[: stream.tokens.shape[1]]
        numbers = np.repeat(indices, documents.lengths[indices])[: stream.tokens.shape[1]]
        positions = np.concatenate([np.arange(documents.lengths[i]) for i in indices])[: stream.tokens.shape[1]]
        np.testing.assert_array_equal(stream.tokens[pack], tokens)
        np.testing.assert_array_equal(stream.documents[pack], numbers)
        np.testing.assert_array_equal(stream.positions[pack], positions)


@SHAPES
def test_targets_are_the_next_tokens_and_weigh_inside_documents_only(documents, packs, packing):
    stream = streams(documents, config(packs, packing), 20)
    np.testing.assert_array_equal(stream.targets[:, :-1], stream.tokens[:, 1:])
    np.testing.assert_array_equal(stream.weights == 0, stream.tokens == 2)
    ends = stream.positions[:, 1:] == 0
    np.testing.assert_array_equal(stream.weights[:, :-1] == 0, ends)
    assert (stream.documents[:, :-1] == stream.documents[:, 1:])[~ends].all()
    assert (stream.targets[stream.tokens == 2] == 1).all()


def test_weights_leave_out_what_does_not_count(documents):
    random = np.random.default_rng(0)
    counted = [random.random(length) < 0.5 for length in LENGTHS]
    some = corpus.from_arrays([documents.document(i) for i in range(len(documents))], counted)
    assert some.key != documents.key
    stream = streams(some, config(), 20)
    target = np.r_[stream.positions[0, 1:], 0]  # 0 after the last token of a document
    expected = [p > 0 and counted[number][p] for number, p in zip(stream.documents[0], target, strict=True)]
    np.testing.assert_array_equal(stream.weights[0, :-1], expected[:-1])
    for begin in range(LENGTHS[6]):
        for end in range(begin + 1, LENGTHS[6] + 1):
            expected = np.r_[counted[6][1:], False][begin:end]
            np.testing.assert_array_equal(some.weights(6, begin, end), expected)


def test_types_and_shapes(documents):
    (batch, _), *_ = batches(documents, config(packs=3, packing=4), 1)
    for name, field in zip(rows.Batch._fields, batch, strict=True):
        assert field.shape == (12, CONTEXT)
        assert field.dtype == (np.float32 if name == "weights" else np.int32)


@SHAPES
def test_resume_anywhere_gives_the_same_batches(documents, packs, packing):
    values = config(packs, packing)
    whole = list(batches(documents, values, 30))
    for step in range(30):
        saved = rows.position_from_dict(json.loads(json.dumps(whole[step][1].to_dict())))
        assert saved == whole[step][1]
        for (batch, position), (expected, after) in zip(
            batches(documents, values, 3, saved), whole[step + 1 :], strict=False
        ):
            assert_same(batch, expected)
            assert position == after


def test_two_hosts_give_the_rows_of_one(documents):
    values = config(packs=4, packing=2)
    one, left, right = (batches(documents, values, 20, packs=packs) for packs in (range(4), [0, 1], [2, 3]))
    for (batch, position), (a, after_a), (b, after_b) in zip(one, left, right, strict=True):
        assert_same(batch, rows.Batch(*(np.concatenate(pair) for pair in zip(a, b, strict=True))))
        assert position == after_a == after_b


def test_packing_does_not_change_the_stream(documents):
    reference = streams(documents, config(packs=4, packing=1), 16)
    for packing in (2, 4):
        assert_same(streams(documents, config(packs=4, packing=packing), 16 // packing), reference)


def test_seed_changes_the_order(documents):
    first, second = (streams(documents, config(seed=seed), 20).tokens for seed in (0, 1))
    assert (first != second).any()


def test_reading_does_not_depend_on_the_step(documents, monkeypatch):
    calls = []
    original = permutation.shuffled
    monkeypatch.setattr(permutation, "shuffled", lambda *a: calls.append(a) or original(*a))
    counts = []
    for ordinal in (0, 10**12):
        position = rows.start(config())._replace(ordinals=tuple(range(ordinal, ordinal + 4)))
        calls.clear()
        rows.next_batch(mixture.mix(documents, config().data), position, config(), range(4))
        counts.append(len(calls))
    assert max(counts) < 50


def test_equal_texts_in_a_batch_have_equal_numbers(documents):
    values = config(packs=3 * len(documents), packing=1)
    for batch, _ in batches(documents, values, 5):
        for number in range(len(documents)):
            mine = batch.documents == number
            np.testing.assert_array_equal(batch.tokens[mine], documents.document(number)[batch.positions[mine]])


def test_tokens_of_each_source_are_counted(documents):
    both = corpus.Corpus(documents.parts + corpus.from_arrays([np.full(50, 9)]).parts)
    values = dataclasses.replace(config(), data=dataclasses.replace(config().data, weights=(3.0, 1.0)))
    found = np.zeros(2, int)
    for batch, position in batches(both, values, 50):
        found += np.bincount(batch.documents.ravel() == len(documents), minlength=2)
        np.testing.assert_array_equal(position.tokens, found)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ordinals": [1], "tokens": [0]},
        {"ordinals": [1], "offsets": [1, 2], "tokens": [0]},
        {"ordinals": [], "offsets": [], "tokens": [0]},
        {"ordinals": [1], "offsets": [1], "tokens": []},
        {"ordinals": [-2], "offsets": [0], "tokens": [0]},
        {"ordinals": ["a"], "offsets": [0], "tokens": [0]},
        {"ordinals": 1, "offsets": 1, "tokens": 1},
    ],
)
def test_damaged_position_is_one_line(values):
    with pytest.raises(DataError) as caught:
        rows.position_from_dict(values)
    assert "\n" not in str(caught.value)


def test_position_of_another_batch_size_names_the_field(documents):
    with pytest.raises(DataError, match=r"data\.batch_size=8 .* makes 4"):
        next(batches(documents, config(packs=4), 1, rows.start(config(packs=2))))


def test_position_of_other_sources_names_the_field(documents):
    with pytest.raises(DataError, match=r"2 sources but data\.task names 1"):
        next(batches(documents, config(), 1, rows.start(config())._replace(tokens=(0, 0))))


def test_position_of_other_documents(documents):
    with pytest.raises(DataError, match="past the end"):
        next(batches(documents, config(), 1, rows.Position((0, 1, 2, 3), (1000,) * 4, (0,))))


EVALUATIONS = pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 1}, {"batch_size": 20}, {"max_documents": 5}, {"max_tokens": 16}, {"max_tokens": 11}],
    ids=str,
)


@EVALUATIONS
def test_evaluation_gives_each_pair_once_in_order(documents, changes):
    values = EvaluateConfig(**{"batch_size": 3, **changes})
    found = {}
    for batch in rows.evaluation_batches(documents, CONTEXT, values):
        assert all(field.shape == (values.batch_size, CONTEXT) for field in batch)
        for token, target, weight, document, position in zip(*(field.ravel() for field in batch), strict=True):
            if document >= 0:
                assert weight == 1
                found.setdefault(int(document), []).append((position, token, target))
            else:
                assert (token, target, weight, position) == (0, 0, 0, 0)
    limit = values.max_tokens or 10**6
    assert sorted(found) == list(range(values.max_documents or len(documents)))
    for index, triples in found.items():
        tokens = documents.document(index)
        pairs = list(zip(range(limit), tokens[:-1], tokens[1:], strict=False))
        assert triples == pairs


@EVALUATIONS
def test_evaluation_row_holds_its_document_to_the_end(documents, changes):
    values = EvaluateConfig(**{"batch_size": 3, **changes})
    all_batches = list(rows.evaluation_batches(documents, CONTEXT, values))
    assert len(all_batches) == rows.evaluation_batch_count(documents, CONTEXT, values)
    started = []
    for before, batch in zip([None, *all_batches], all_batches, strict=False):
        for row in range(values.batch_size):
            used = batch.documents[row] >= 0
            assert len(set(batch.documents[row][used])) <= 1 and (np.diff(used.astype(int)) <= 0).all()
            if used[0] and batch.positions[row, 0] > 0:
                assert before.documents[row, -1] == batch.documents[row, 0]
                assert before.positions[row, -1] + 1 == batch.positions[row, 0]
            elif used[0]:
                started.append(int(batch.documents[row, 0]))
        assert (batch.documents >= 0).any()
        idle = (batch.documents < 0).all(axis=1)
        assert not idle.any() or len(started) == (values.max_documents or len(documents))
    assert started == sorted(started)


def test_evaluation_types_match_training(documents):
    batch = next(rows.evaluation_batches(documents, CONTEXT, EvaluateConfig(batch_size=20)))
    [(training, _)] = batches(documents, config(), 1)
    assert [field.dtype for field in batch] == [field.dtype for field in training]
