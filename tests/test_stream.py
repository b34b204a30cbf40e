"""Nothing lost or doubled between documents and batches, whoever reads them; and the released code's batches."""

import itertools
import json
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fot import attention
from fot.config import CrossbatchConfig, DataConfig, ExperimentConfig
from fot.data import corpus, loader, mixture, rows

DATA = pathlib.Path(__file__).parent / "data"


class Host:
    """The rows that one of several hosts holds, as the sharding of a batch tells them."""

    def __init__(self, number: int, hosts: int, count: int):
        self._rows = slice(number * count // hosts, (number + 1) * count // hosts)

    def addressable_devices_indices_map(self, shape):
        return {"device": (self._rows, slice(None))}


def read(documents, config, position, hosts, steps):
    """Returns the next `steps` batches, put together from the rows of `hosts` hosts, and the position after them."""
    count = config.data.batch_size
    parts = []
    for number in range(hosts):
        with (
            mock.patch.object(loader, "global_batch", lambda batch, sharding, rows: batch),
            loader.Loader(documents, config, position, Host(number, hosts, count), 1) as batches,
        ):
            parts.append(list(itertools.islice(batches, steps)))
    steps = list(zip(*parts, strict=True))
    for step in steps:
        assert len({one.position for one in step}) == 1
    whole = [zip(*(one.batch for one in step), strict=True) for step in steps]
    return [rows.Batch(*map(np.concatenate, fields)) for fields in whole], parts[0][-1].position


@st.composite
def runs(draw):
    """Returns a corpus whose tokens are all different, and a config."""
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=12))
    sources = draw(st.integers(1, min(len(lengths), 3)))
    ends = np.cumsum(lengths)
    arrays = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    parts = [corpus.from_arrays(arrays[source::sources]).parts[0] for source in range(sources)]
    packing = draw(st.integers(1, 3))
    data = DataConfig(
        task=("python_stdlib",) * sources,
        weights=tuple(draw(st.floats(0.5, 3)) for _ in range(sources)),
        batch_size=packing * draw(st.integers(4, 7)),
        context=draw(st.integers(1, 8)),
        packing=draw(st.sampled_from(sorted(rows.PACKINGS))),
        seed=draw(st.integers(0, 99)),
    )
    return corpus.Corpus(tuple(parts)), ExperimentConfig(
        crossbatch=CrossbatchConfig(variant="none", packing=packing), data=data
    )


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(runs(), st.sampled_from([(1, 2), (2, 4), (4, 1), (4, 4)]), st.integers(1, 5))
def test_every_token_of_an_epoch_once_through_an_interruption_and_a_change_of_hosts(run, hosts, interrupted):
    documents, config = run
    stream = mixture.mix(documents, config.data)
    n, packs = len(documents), rows.pack_count(config)
    batches, position = read(documents, config, rows.start(config), hosts[0], interrupted)
    while min(position.ordinals) < n:  # until every document of the first n ordinals is read to its end
        position = rows.position_from_dict(json.loads(json.dumps(position.to_dict())))
        more, position = read(documents, config, position, hosts[1], 4)
        batches += more

    # What was read is what the ordinals before the position stand for, each to its end once, and the rest in part.
    current = dict(zip(position.ordinals, position.offsets, strict=True))
    if config.data.packing == "strided":
        ended = [o for last in position.ordinals for o in range(last % packs, last, packs)]
    else:
        ended = [o for o in range(max(position.ordinals)) if o not in current]
    assert set(range(n)) <= set(ended) and len(set(ended)) == len(ended)
    if len(documents.parts) == 1:
        assert sorted(map(stream.document_at, range(n))) == list(range(n))
    expected = [documents.document(stream.document_at(o)) for o in ended]
    expected += [documents.document(stream.document_at(o))[:offset] for o, offset in current.items()]
    found = np.concatenate([batch.tokens.ravel() for batch in batches])
    assert sorted(found) == sorted(np.concatenate(expected))

    # Rows of a pack are contiguous: a document's tokens one after the other, to its end, then another's from its start.
    numbers, positions, weights = (
        np.concatenate([getattr(batch, name).reshape(packs, -1) for batch in batches], axis=1)
        for name in ("documents", "positions", "weights")
    )
    goes_on = (numbers[:, 1:] == numbers[:, :-1]) & (positions[:, 1:] == positions[:, :-1] + 1)
    last = documents.lengths[numbers[:, :-1]] - 1
    assert (goes_on | ((positions[:, 1:] == 0) & (positions[:, :-1] == last))).all()
    np.testing.assert_array_equal(weights[:, :-1], goes_on)


@pytest.mark.parametrize("packing", rows.PACKINGS)
def test_a_copy_in_another_pack_is_no_negative_and_shows_nothing_to_come(packing):
    """Two packs on one document: neither sees of the other what comes later in the text, though others are visible."""
    documents = corpus.from_arrays([np.arange(50)])
    config = ExperimentConfig(
        crossbatch=CrossbatchConfig(variant="none", packing=1),
        data=DataConfig(batch_size=2, context=16, packing=packing),
    )
    batches, _ = read(documents, config, rows.start(config), 1, 9)
    for batch in batches:
        tokens = attention.Tokens(batch.documents, batch.positions)
        others = attention.Tokens(batch.documents[::-1], batch.positions[::-1])
        visible = jax.device_get(attention.visible(tokens, others, np.array([True, True])))
        np.testing.assert_array_equal(visible, batch.tokens[::-1][:, None, :] <= batch.tokens[:, :, None])


class InOrder:
    """The stream of documents in the order they are given, again and again."""

    def __init__(self, documents: corpus.Corpus, order: np.ndarray):
        self.corpus, self._order = documents, order

    def document_at(self, ordinal: int) -> int:
        return self._order[ordinal % len(self._order)]


def test_released_packing_gives_the_released_codes_batches():
    golden = np.load(DATA / "pipeline_mixed_b4s16_doc_aware_k2.npz")
    documents = json.loads((DATA / "pipeline_docs_mixed.json").read_text())
    wanted = json.loads(str(golden["settings"]))
    names = sorted({document["source"] for document in documents})
    places = [[i for i, document in enumerate(documents) if document["source"] == name] for name in names]
    parts = [
        corpus.from_arrays([documents[i]["tokens"] for i in mine], [documents[i]["loss_mask"] for i in mine]).parts[0]
        for mine in places
    ]
    stream = InOrder(corpus.Corpus(tuple(parts)), np.argsort(np.concatenate(places)))
    packing = wanted["dataset_packing"]
    data = DataConfig(
        task=("python_stdlib",) * len(names), batch_size=wanted["batch"], context=wanted["seq"], packing="released"
    )
    config = ExperimentConfig(crossbatch=CrossbatchConfig(variant="none", packing=packing), data=data)
    position = rows.start(config)
    for step, metrics in enumerate(wanted["metrics"]):
        before = position.tokens
        batch, position = rows.next_batch(stream, position, config, range(rows.pack_count(config)))
        for ours, theirs in (("tokens", "input_tokens"), ("targets", "target_tokens"), ("weights", "loss_masks")):
            np.testing.assert_array_equal(getattr(batch, ours), golden[theirs][step], err_msg=f"{ours} of batch {step}")
            assert getattr(batch, ours).dtype == golden[theirs].dtype
        read = {
            f"batch_tokens_per_source/{name}": new - old
            for name, old, new in zip(names, before, position.tokens, strict=True)
        }
        assert {name: count for name, count in read.items() if count} == {
            name: count for name, count in metrics.items() if name in read
        }
        assert max(position.ordinals) + 1 == metrics["dataset_example_index"]
