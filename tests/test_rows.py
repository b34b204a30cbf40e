import json

import numpy as np
import pytest

from fot.config import CrossbatchConfig, DataConfig, EvaluateConfig, ExperimentConfig
from fot.data import corpus, rows
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
    position = rows.start(values) if position is None else position
    packs = range(rows.pack_count(values)) if packs is None else packs
    for _ in range(count):
        batch, position = rows.next_batch(documents, position, values, packs)
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
        indices = [rows.document_at(o, len(documents), 0) for o in ordinals]
        tokens = np.concatenate([documents.document(i) for i in indices])[: stream.tokens.shape[1]]
        numbers = np.repeat(ordinals, documents.lengths[indices])[: stream.tokens.shape[1]]
        positions = np.concatenate([np.arange(documents.lengths[i]) for i in indices])[: stream.tokens.shape[1]]
        np.testing.assert_array_equal(stream.tokens[pack], tokens)
        np.testing.assert_array_equal(stream.documents[pack], numbers)
        np.testing.assert_array_equal(stream.positions[pack], positions)


@SHAPES
def test_every_token_of_every_document_once_an_epoch(documents, packs, packing):
    values = config(packs, packing)
    stream = streams(documents, values, 1000 // (packs * packing) + 100)
    n = len(documents)
    for epoch in range(2):
        seen = [(stream.documents >= epoch * n) & (stream.documents < (epoch + 1) * n)][0]
        occurrences = stream.documents[seen]
        found = sorted(zip(occurrences.tolist(), stream.positions[seen].tolist(), strict=True))
        expected = [
            (o, p)
            for o in range(epoch * n, (epoch + 1) * n)
            for p in range(documents.lengths[rows.document_at(o, n, 0)])
        ]
        assert found == expected
        assert sorted(stream.tokens[seen].tolist()) == sorted(documents.tokens.tolist())


def test_epochs_are_permutations_in_different_orders():
    orders = [[rows.document_at(e * 50 + i, 50, seed) for i in range(50)] for seed in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@SHAPES
def test_targets_are_the_next_tokens_and_weigh_inside_documents_only(documents, packs, packing):
    stream = streams(documents, config(packs, packing), 20)
    np.testing.assert_array_equal(stream.targets[:, :-1], stream.tokens[:, 1:])
    same = stream.documents[:, :-1] == stream.documents[:, 1:]
    np.testing.assert_array_equal(stream.weights[:, :-1], same)
    np.testing.assert_array_equal(stream.weights == 0, stream.tokens == 2)
    assert (stream.targets[stream.tokens == 2] == 1).all()


def test_document_of_n_tokens_has_n_minus_1_targets(documents):
    stream = streams(documents, config(), 60)
    for ordinal in range(len(documents)):
        mine = stream.documents == ordinal
        length = documents.lengths[rows.document_at(ordinal, len(documents), 0)]
        assert stream.weights[mine].sum() == length - 1


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
    values = config()
    far = rows.Position((10**6,) * 4, (0,) * 4)
    calls = []
    original = rows._permutation.__wrapped__
    rows._permutation.cache_clear()
    monkeypatch.setattr(rows, "_permutation", lambda *a: calls.append(a) or original(*a))
    rows.next_batch(documents, far, values, range(4))
    assert len(calls) < 100


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"finished": [1]},
        {"finished": [1], "offsets": [1, 2]},
        {"finished": [], "offsets": []},
        {"finished": [-1], "offsets": [0]},
        {"finished": ["a"], "offsets": [0]},
        {"finished": 1, "offsets": 1},
    ],
)
def test_damaged_position_is_one_line(values):
    with pytest.raises(DataError) as caught:
        rows.position_from_dict(values)
    assert "\n" not in str(caught.value)


def test_position_of_another_batch_size_names_the_field(documents):
    with pytest.raises(DataError, match=r"data\.batch_size=8 .* makes 4"):
        rows.next_batch(documents, rows.start(config(packs=2)), config(packs=4), range(4))


def test_position_of_other_documents(documents):
    with pytest.raises(DataError, match="past the end"):
        rows.next_batch(documents, rows.Position((0,) * 4, (1000,) * 4), config(), range(4))


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
    training, _ = rows.next_batch(documents, rows.start(config()), config(), range(4))
    assert [field.dtype for field in batch] == [field.dtype for field in training]
