"""Properties of the stream: permutations without arrays, shares that add up, epochs of each source."""

import collections
import itertools

import numpy as np
import pytest

from fot.config import CrossbatchConfig, DataConfig, ExperimentConfig
from fot.data import corpus, loader, mixture, permutation
from fot.data import rows as rows_lib
from fot.errors import DataError


def sources(*lengths: np.ndarray) -> corpus.Corpus:
    """Returns a corpus with a source for each array of document lengths; its tokens tell the source."""
    parts = [
        corpus.from_arrays([np.full(length, number + 3) for length in each]).parts[0]
        for number, each in enumerate(lengths)
    ]
    return corpus.Corpus(tuple(parts))


def config(weights, unit="documents", **data) -> DataConfig:
    count = len(weights)
    return DataConfig(task=("python_stdlib",) * count, weights=tuple(weights), weight_unit=unit, **data)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 10, 50, 1000])
def test_shuffled_is_a_permutation_for_every_key(count):
    orders = {tuple(permutation.shuffled(i, count, key) for i in range(count)) for key in range(3)}
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 10 or len(orders) == 3


def test_shuffled_has_every_order_equally_often():
    orders = collections.Counter(tuple(permutation.shuffled(i, 4, key) for i in range(4)) for key in range(2400))
    assert len(orders) == 24
    assert 50 < min(orders.values()) and max(orders.values()) < 150  # 100 each; 5 standard deviations


def test_a_single_source_is_its_own_epochs_in_order():
    stream = mixture.mix(sources(np.full(50, 2)), config([1.0], seed=3))
    numbers = [stream.document_at(ordinal) for ordinal in range(150)]
    assert numbers == [permutation.shuffled(i, 50, 3, 0, epoch) for epoch in range(3) for i in range(50)]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 1e-4), (25, 25, 10, 29, 5, 2, 2, 2)])
def test_each_source_gives_its_epochs_one_after_the_other(weights):
    counts = [7, 30, 4, 1, 12, 2, 50, 3][: len(weights)]
    stream = mixture.mix(sources(*(np.full(count, 2) for count in counts)), config(weights))
    places = [stream.place(ordinal) for ordinal in range(3 * stream.block)]
    for source, count in enumerate(counts):
        mine = {place.index: ordinal for ordinal, place in enumerate(places) if place.source == source}
        assert sorted(mine) == list(range(len(mine))) and len(mine) == sum(place.source == source for place in places)
        for epoch in range(min(len(mine) // count, 3)):
            numbers = [stream.document_at(mine[epoch * count + i]) for i in range(count)]
            assert sorted(numbers) == list(range(*stream.corpus.firsts[source : source + 2]))


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1 / 3, 2 / 3), (25, 25, 10, 29, 5, 2, 2, 2), (1.0, 1e-4)])
def test_no_error_of_rounding_adds_up(weights):
    stream = mixture.mix(sources(*(np.full(3, 2) for _ in weights)), config(weights))
    far = 10**12 * stream.block
    for begin in (0, far):
        found = collections.Counter(stream.place(begin + o).source for o in range(stream.block))
        for source, weight in enumerate(weights):
            assert abs(found[source] - stream.block * weight / sum(weights)) < 2
    for source, weight in enumerate(weights):  # documents of a source before an ordinal far away
        place = next(place for o in itertools.count(far) if (place := stream.place(o)).source == source)
        assert place.index == pytest.approx(far * weight / sum(weights), rel=1e-5)


TOKENS = 10_000_000
WEIGHTS = (0.5, 0.3, 0.15, 0.05)
LENGTHS = [
    np.random.default_rng(i).integers(low, high, 400) for i, (low, high) in enumerate([(30, 90), (300, 500)] * 2)
]


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_shares_over_ten_million_tokens(unit):
    stream = mixture.mix(sources(*LENGTHS), config(WEIGHTS, unit))
    lengths = stream.corpus.lengths
    tokens, documents, total = np.zeros(len(WEIGHTS)), np.zeros(len(WEIGHTS)), 0
    for ordinal in itertools.count():
        if total >= TOKENS:
            break
        number = stream.document_at(ordinal)
        source = stream.corpus.source(number)
        tokens[source] += lengths[number]
        documents[source] += 1
        total += lengths[number]
    counted = tokens if unit == "tokens" else documents
    np.testing.assert_allclose(counted / counted.sum(), WEIGHTS, rtol=0.01)


@pytest.mark.parametrize("packing", ["strided", "released"])
def test_shares_of_the_tokens_in_batches(packing):
    data = config(WEIGHTS, "tokens", batch_size=16, context=128, packing=packing)
    values = ExperimentConfig(crossbatch=CrossbatchConfig(variant="none", packing=2), data=data)
    with loader.Loader(sources(*LENGTHS), values, rows_lib.start(values), None, 2) as batches:
        found = np.zeros(len(WEIGHTS))
        for loaded in itertools.islice(batches, 600):
            found += np.bincount(loaded.batch.tokens.ravel() - 3, minlength=len(WEIGHTS))
            np.testing.assert_array_equal(loaded.position.tokens, found)
    np.testing.assert_allclose(found / found.sum(), WEIGHTS, atol=0.01)


def test_a_share_too_small_to_count_names_the_field():
    with pytest.raises(DataError, match=r"data\.weights=\(1.0, 1e-12\)") as error:
        mixture.mix(sources(np.full(3, 2), np.full(3, 2)), config([1.0, 1e-12]))
    assert "\n" not in str(error.value)


def test_the_seed_changes_sources_and_documents():
    corpora = sources(np.full(50, 2), np.full(50, 2))
    streams = [mixture.mix(corpora, config([1.0, 1.0], seed=seed)) for seed in (0, 1)]
    orders = [[stream.place(o).source for o in range(100)] for stream in streams]
    assert orders[0] != orders[1]
    assert [streams[0].document_at(o) for o in range(100)] != [streams[1].document_at(o) for o in range(100)]
