"""Batches prepared in the background and placed on the devices."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, final

import jax
import numpy as np

from fot.batch import Batch
from fot.config import ExperimentConfig
from fot.data import mixture, rows
from fot.data.corpus import Corpus

_POLL = 0.05  # seconds between two looks at whether the loader was closed


class Loaded(NamedTuple):
    """A batch and what came with it.

    Attributes:
      batch: rows of numpy arrays, or of global jax arrays.
      position: the position after this batch: what to save with the parameters that have seen it.
      data_wait: seconds that the consumer waited for the batch.
    """

    batch: Batch
    position: rows.Position
    data_wait: float


def host_rows(config: ExperimentConfig, sharding: jax.sharding.Sharding) -> list[int]:
    """Returns the rows of the global batch [R, T] that the devices of this process hold, ascending."""
    shape = (config.data.batch_size, config.data.context)
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for index in indices for row in range(shape[0])[index[0]]})


def global_batch(batch: Batch, sharding: jax.sharding.Sharding, rows: int) -> Batch:
    """Returns the rows of this host [rows of `host_rows`, T] as global arrays [R, T]; with one process, all rows."""
    make = jax.make_array_from_process_local_data
    return Batch(*(make(sharding, field, (rows, *field.shape[1:])) for field in batch))


def batches(
    corpus: Corpus, config: ExperimentConfig, position: rows.Position, sharding: jax.sharding.Sharding | None
) -> Iterator[tuple[Batch, rows.Position]]:
    """Yields the batches from `position` on, each with the position after it; arguments are those of `Loader`."""
    packing = config.crossbatch.packing
    wanted = list(range(config.data.batch_size)) if sharding is None else host_rows(config, sharding)
    packs = sorted({row // packing for row in wanted})
    # A pack may lie on two hosts: each reads all of it and keeps its own rows.
    kept = np.array([packs.index(row // packing) * packing + row % packing for row in wanted])
    stream = mixture.mix(corpus, config.data)
    while True:
        batch, position = rows.next_batch(stream, position, config, packs)
        batch = Batch(*(field[kept] for field in batch))
        yield (batch if sharding is None else global_batch(batch, sharding, config.data.batch_size)), position


@final
class Loader:
    """Iterates over the training batches from a position on, always some batches ahead; never ends by itself.

    `with Loader(...) as loader: for batch, position, data_wait in loader: ...`

    The batches are those of `rows.next_batch`, whatever `prefetch` is. An error in the background is raised by
    `next`. For one consumer.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: ExperimentConfig,
        position: rows.Position,
        sharding: jax.sharding.Sharding | None,
        prefetch: int,
    ):
        """Starts the thread that prepares batches.

        Args:
          sharding: of the global batch [R, T], for global jax arrays; None for numpy arrays of all rows.
          prefetch: batches that may lie ready, at least 1.
        """
        if prefetch < 1:
            raise ValueError(f"prefetch={prefetch} must be at least 1")
        self._ready: queue.Queue[tuple[Batch, rows.Position] | BaseException] = queue.Queue(prefetch)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        arguments = (batches(corpus, config, position, sharding), self._ready, self._closed)
        self._thread = threading.Thread(target=_fill, args=arguments, name="fot-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Loaded:
        began = time.perf_counter()
        if self._closed.is_set():
            raise StopIteration
        if self._error is not None:
            raise self._error
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return Loaded(*item, time.perf_counter() - began)

    def close(self) -> None:
        """Stops the thread and forgets the batches that lay ready; iteration ends."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _fill(items: Iterator, ready: queue.Queue, closed: threading.Event) -> None:
    """Puts items into `ready` until `closed`; an error takes the place of the item it prevented."""
    try:
        for item in items:
            if not _put(item, ready, closed):
                return
    except BaseException as error:
        _put(error, ready, closed)


def _put(item: object, ready: queue.Queue, closed: threading.Event) -> bool:
    """Waits for room in `ready`; returns False when `closed` came first."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=_POLL)
            return True
        except queue.Full:
            continue
    return False
