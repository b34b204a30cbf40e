"""How fast a run is and what its time goes into, from one line of metrics to the next."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple, final

from fot import train_step
from fot.config import ExperimentConfig
from fot.profiling import Watch


class Speed(NamedTuple):
    """How fast steps were, on average; `save_wait` is a sum.

    Attributes:
      tokens_per_second: of the batches.
      model_flops_per_second: by the formula of `fot.flops`.
      step_time: seconds of a step.
      data_wait: seconds of it that it waited for data.
      compute_time: the others.
      save_wait: all the seconds since the reading before that went into saves.
    """

    tokens_per_second: float
    model_flops_per_second: float
    step_time: float
    data_wait: float
    compute_time: float
    save_wait: float


@final
class Clock:
    """Times whole steps; what isn't one (compilations, saves, evaluations) stops it."""

    def __init__(self, config: ExperimentConfig, watch: Watch):
        """Args: config: the run; watch: is told when steps begin and end."""
        self._config, self._watch, self._save_wait = config, watch, 0.0
        self.start()

    def start(self) -> None:
        """Begins anew."""
        self._began, self._steps, self._data_wait = time.perf_counter(), 0, 0.0
        self._watch.begin()

    def count(self, step: int, data_wait: float) -> None:
        """Counts a step that begins, counted from 0, which waited so many seconds for its data."""
        self._steps += 1
        self._data_wait += data_wait
        self._watch.step = step

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The block is no part of a step; after it the clock begins anew."""
        self._watch.rest()
        yield
        self.start()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """`stopped`, for a block that waits for a checkpoint."""
        began = time.perf_counter()
        with self.stopped():
            yield
            self._save_wait += time.perf_counter() - began

    def read(self, d: int) -> Speed:
        """Returns the speed of the steps since the last start, which all are done now, and begins anew."""
        seconds, data_wait = (time.perf_counter() - self._began) / self._steps, self._data_wait / self._steps
        save_wait, self._save_wait = self._save_wait, 0.0
        self._watch.end()
        self.start()
        return Speed(
            tokens_per_second=self._config.data.batch_size * self._config.data.context / seconds,
            model_flops_per_second=train_step.step_flops(self._config, d) / seconds,
            step_time=seconds,
            data_wait=data_wait,
            compute_time=seconds - data_wait,
            save_wait=save_wait,
        )
