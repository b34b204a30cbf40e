import itertools
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot.config import CrossbatchConfig, DataConfig, ExperimentConfig
from fot.data import corpus, loader, mixture, rows

CONFIG = ExperimentConfig(
    crossbatch=CrossbatchConfig(variant="none", packing=2), data=DataConfig(batch_size=8, context=16)
)


@pytest.fixture(scope="module")
def documents():
    lengths = np.random.default_rng(0).integers(20, 90, 30)
    return corpus.from_arrays([np.r_[1, np.arange(3, n + 1), 2] for n in lengths])


@pytest.fixture
def sharding():
    return NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))


def open_loader(documents, position=None, sharding=None, prefetch=2):
    return loader.Loader(documents, CONFIG, position or rows.start(CONFIG), sharding, prefetch)


def expected(documents, count):
    stream, position = mixture.mix(documents, CONFIG.data), rows.start(CONFIG)
    for _ in range(count):
        batch, position = rows.next_batch(stream, position, CONFIG, range(4))
        yield batch, position


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_batches_do_not_depend_on_prefetch(documents, prefetch):
    with open_loader(documents, prefetch=prefetch) as batches:
        for loaded, (batch, position) in zip(batches, expected(documents, 20), strict=False):
            assert_same(loaded.batch, batch)
            assert loaded.position == position
            assert loaded.data_wait >= 0


def test_resume_from_the_position_of_any_batch(documents):
    with open_loader(documents) as batches:
        whole = list(itertools.islice(batches, 10))
    for step in range(9):
        with open_loader(documents, whole[step].position) as batches:
            assert_same(next(batches).batch, whole[step + 1].batch)


def test_global_arrays_hold_the_rows(documents, sharding):
    with open_loader(documents, sharding=sharding) as batches:
        for loaded, (batch, _) in zip(batches, expected(documents, 5), strict=False):
            for array, field in zip(loaded.batch, batch, strict=True):
                assert isinstance(array, jax.Array) and array.sharding == sharding
                assert array.dtype == field.dtype and array.shape == field.shape
            assert_same(loaded.batch, batch)


def test_one_process_holds_all_rows(sharding):
    assert loader.host_rows(CONFIG, sharding) == list(range(8))


def test_host_without_whole_packs_keeps_its_own_rows(documents, sharding, monkeypatch):
    mine = [3, 4, 6]
    monkeypatch.setattr(loader, "host_rows", lambda config, sharding: mine)
    monkeypatch.setattr(loader, "global_batch", lambda batch, sharding, rows: batch)
    with open_loader(documents, sharding=sharding) as batches:
        for loaded, (batch, _) in zip(batches, expected(documents, 5), strict=False):
            assert_same(loaded.batch, [field[mine] for field in batch])


def test_error_in_the_background_reaches_the_consumer(documents, monkeypatch):
    original, calls = rows.next_batch, itertools.count()

    def failing(*arguments):
        if next(calls) == 3:
            raise OSError("disk is gone")
        return original(*arguments)

    monkeypatch.setattr(rows, "next_batch", failing)
    with open_loader(documents) as batches:
        for _ in range(3):
            next(batches)
        for _ in range(2):
            with pytest.raises(OSError, match="disk is gone"):
                next(batches)


@pytest.mark.parametrize("prefetch", [1, 5])
@pytest.mark.parametrize("taken", [0, 3])
def test_close_stops_the_thread_promptly(documents, prefetch, taken):
    before = threading.active_count()
    batches = open_loader(documents, prefetch=prefetch)
    list(itertools.islice(batches, taken))
    began = time.perf_counter()
    batches.close()
    assert time.perf_counter() - began < 2
    assert threading.active_count() == before
    assert list(batches) == []
    batches.close()


def test_prefetch_is_bounded(documents, monkeypatch):
    original, calls = rows.next_batch, []
    monkeypatch.setattr(rows, "next_batch", lambda *a: calls.append(0) or original(*a))
    with open_loader(documents, prefetch=2) as batches:
        next(batches)
        time.sleep(0.3)
        assert len(calls) <= 4


def test_data_wait_is_the_time_waited(documents, monkeypatch):
    original = rows.next_batch
    monkeypatch.setattr(rows, "next_batch", lambda *a: time.sleep(0.1) or original(*a))
    with open_loader(documents) as batches:
        next(batches)
        assert 0.05 < next(batches).data_wait < 2


def test_prefetch_of_nothing_is_refused(documents):
    with pytest.raises(ValueError, match="prefetch=0"):
        open_loader(documents, prefetch=0)


def test_a_step_that_is_slower_than_packing_does_not_wait(documents):
    with open_loader(documents) as batches:
        waits = []
        for loaded in itertools.islice(batches, 20):
            waits.append(loaded.data_wait)
            time.sleep(0.02)  # the step
    assert np.median(waits[1:]) < 0.002
