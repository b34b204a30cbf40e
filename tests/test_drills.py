"""Failure drills with real processes: whatever befalls a run, it goes on, and nobody can tell it from a whole one.

Each drill is repeated with other seeds, FOT_DRILLS of them, 2 if that is not set:

  FOT_DRILLS=20 python -m pytest -m slow tests/test_drills.py

A drill disturbs a run at moments that its seed draws, as a function of `DRILLS`. Then the same command runs to its end,
and every line of the metrics, checksums of the batches among them, is that of a run that nothing befell: no document
is lost or repeated. Every checkpoint on disk is restored. Whatever takes longer than `LONG` is a hang.
"""

import contextlib
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pytest

from fot import cli, profiling
from tests.trainings import Place, place_in, state_of, until

REPEATED = int(os.environ.get("FOT_DRILLS", "2"))
STEPS, SAVE_EVERY, EVALUATE_EVERY = 24, 3, 4
LEAST = STEPS // 2  # steps that are yet to do when a run is disturbed
LONG = 180  # seconds; JAX takes a silent process for lost after 60
ABORTED = -signal.SIGABRT  # so JAX ends a process whose first one is gone
ENDED = (cli.RETRY, ABORTED)

# One program to compile; two processes don't evaluate.
FLAGS = ["--config.crossbatch.d=2", "--config.crossbatch.d_schedule=constant"]
ALONE = {1: [], 2: ["--config.train.evaluate_every=0"]}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    """A place of runs, with "whole-1" and "whole-2" of one and two processes that nothing befell."""
    there = place_in(tmp_path_factory.mktemp("drills"), steps=STEPS, save_every=SAVE_EVERY)
    for count in (1, 2):
        with Run(there, f"whole-{count}", count).started() as processes:
            assert codes(processes) == [0] * count, there.errors(f"whole-{count}")
    yield there
    shutil.rmtree(there.folder)


class Run(NamedTuple):
    """A run of one process, or two of one device each."""

    place: Place
    name: str
    count: int

    @contextlib.contextmanager
    def started(
        self,
        late: Sequence[float] = (0, 0),
        skew: Sequence[float] = (0, 0),
        flags: Sequence[str] = (),
        **environment: str,
    ) -> Iterator[list[subprocess.Popen]]:
        """Gives its processes, none of which is left after the block.

        Args:
          late: seconds after which each starts.
          skew: seconds that the clock of each is ahead.
          flags: of all.
          environment: variables of all.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        processes: list[subprocess.Popen | None] = [None] * self.count
        try:
            began = time.monotonic()
            for number in sorted(range(self.count), key=lambda number: late[number]):
                time.sleep(max(began + late[number] - time.monotonic(), 0))
                own = {"FOT_SKEW": str(skew[number]), "PYTHONPATH": str(pathlib.Path(__file__).parent / "disturbed")}
                if self.count > 1:
                    own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
                    own |= {"JAX_NUM_PROCESSES": str(self.count), "JAX_PROCESS_ID": str(number)}
                all_flags = [*FLAGS, *ALONE[self.count], *flags]
                processes[number] = self.place.start(self.name, *all_flags, number=number, **own, **environment)
            yield processes
        finally:
            for process in filter(None, processes):
                process.kill()
                process.wait()

    @property
    def workdir(self) -> pathlib.Path:
        return self.place.folder / self.name

    def out(self) -> str:
        """Returns what the first process has said."""
        return self.place.said(self.name, "out").read_text()

    def saving(self, after: int) -> bool:
        """Returns whether a checkpoint of a later step is being written."""
        names = self.place.saves(self.name)
        return any("tmp" in name and int(name.split(".")[0]) > after for name in names)

    def complete(self) -> list[int]:
        """Returns the steps of its checkpoints."""
        return sorted(int(name) for name in self.place.saves(self.name) if name.isdigit())

    def goes_on(self) -> None:
        """Runs the same command to its end: then it is as a run that nothing befell."""
        with self.started() as processes:
            assert codes(processes) == [0] * self.count, self.place.errors(self.name)
        assert self.place.metrics(self.name) == self.place.metrics(f"whole-{self.count}")
        assert self.complete()[-1] == STEPS
        for step in self.complete():
            self.check(step)

    def check(self, step: int) -> None:
        """Restores a checkpoint: at a step that a run that nothing befell has saved too, it is the same."""
        here = state_of(self.workdir, step)
        assert int(here.state.step) == step
        if step % SAVE_EVERY:
            return
        there = state_of(self.place.folder / f"whole-{self.count}", step)
        assert here.data_position == there.data_position
        for left, right in zip(jax.tree.leaves(here.state), jax.tree.leaves(there.state), strict=True):
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def codes(processes: Sequence[subprocess.Popen]) -> list[int]:
    """Returns the exit codes, within `LONG` seconds."""
    deadline = time.monotonic() + LONG
    return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in processes]


def signal_one_of_two(
    run: Run, draw: random.Random, which: signal.Signals, first: int = 1, flags: Sequence[str] = ()
) -> tuple[int, list[int]]:
    """Sends a signal to one of two after a step, `first` at least; returns its number, and the exit codes of both."""
    number, step = draw.randrange(2), draw.randrange(first, STEPS - LEAST)
    with run.started(flags=flags) as processes:
        until(lambda: run.place.step(run.name) >= step, *processes)
        time.sleep(draw.uniform(0, 0.05))
        processes[number].send_signal(which)
        return number, codes(processes)


def kill_one_of_two_in_a_step(run: Run, draw: random.Random) -> None:
    number, ended = signal_one_of_two(run, draw, signal.SIGKILL)
    assert ended[number] == -signal.SIGKILL and ended[1 - number] in ENDED, run.place.errors(run.name, 1 - number)


def one_of_two_is_stuck(run: Run, draw: random.Random) -> None:
    limit = "--config.train.stuck_seconds=12"
    _, ended = signal_one_of_two(run, draw, signal.SIGUSR1, profiling.KNOWN + 1, [limit])
    said = [run.place.errors(run.name, each) for each in (0, 1)]
    assert ended == [cli.RETRY] * 2, said
    for lines in said:
        [line] = [line for line in lines if line.startswith("error:")]
        assert line.startswith("error: nothing has come for ") and "from the newest checkpoint" in line, line
        assert all(f"process {each} is at step " in line for each in (0, 1)), line  # in different places


def kill_in_a_save(run: Run, draw: random.Random) -> None:
    number, step = draw.randrange(run.count), draw.randrange(0, STEPS - LEAST)
    with run.started() as processes:
        until(lambda: run.saving(step), *processes)
        time.sleep(draw.uniform(0, 0.03))
        processes[number].kill()
        codes(processes)
    assert STEPS not in run.complete(), "it was not killed"


def sigterm_to_one_of_two(run: Run, draw: random.Random) -> None:
    _, ended = signal_one_of_two(run, draw, signal.SIGTERM)
    said = [run.place.errors(run.name, each)[-1] for each in (0, 1)]
    saved = f"terminated: step {max(run.complete(), default=0)} is saved; the same command goes on from it"
    assert ended == [cli.RETRY] * 2 and said == [saved] * 2 and run.place.step(run.name) == max(run.complete()), said


def sigterm_in_compilation(run: Run, draw: random.Random) -> None:
    with run.started(JAX_ENABLE_COMPILATION_CACHE="false") as [process]:
        until(lambda: "training documents" in run.out(), process)
        time.sleep(draw.uniform(0, 1))
        assert "compiled" not in run.out()
        process.terminate()
        assert codes([process]) == [cli.RETRY], run.place.errors(run.name)
    assert run.complete() == []


def sigterm_in_evaluation(run: Run, draw: random.Random) -> None:
    step = EVALUATE_EVERY * draw.randrange(1, (STEPS - LEAST) // EVALUATE_EVERY + 1)
    with run.started() as [process]:
        until(lambda: run.place.step(run.name) >= step, process)
        time.sleep(draw.uniform(0, 0.02))
        terminate_and_see_that_all_is_saved(run, process)


def sigterm_in_a_save(run: Run, draw: random.Random) -> None:
    step = draw.randrange(0, STEPS - LEAST)
    with run.started() as [process]:
        until(lambda: run.saving(step), process)
        time.sleep(draw.uniform(0, 0.03))
        terminate_and_see_that_all_is_saved(run, process)


def terminate_and_see_that_all_is_saved(run: Run, process: subprocess.Popen) -> None:
    process.terminate()
    assert codes([process]) == [cli.RETRY], run.place.errors(run.name)
    assert run.place.step(run.name) == max(run.complete())


def the_grace_ends_in_a_save(run: Run, draw: random.Random) -> None:
    step = draw.randrange(1, STEPS - LEAST)
    with run.started() as [process]:
        until(lambda: run.place.step(run.name) >= step, process)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 0.08))
        process.kill()
        assert codes([process])[0] in (-signal.SIGKILL, cli.RETRY)


def a_disk_is_full_on_one_of_two(run: Run, draw: random.Random) -> None:
    number, step = draw.randrange(2), draw.randrange(1, STEPS - LEAST)
    with run.started() as processes:
        until(lambda: run.place.step(run.name) >= step, *processes)
        resource.prlimit(processes[number].pid, resource.RLIMIT_FSIZE, (1000, 1000))
        ended = codes(processes)
    assert 0 not in ended, "it had room"
    assert ended[number] in (cli.USER_ERROR, *ENDED) and ended[1 - number] in (cli.USER_ERROR, *ENDED)
    said = [line for each in (0, 1) for line in run.place.errors(run.name, each) if line.startswith("error:")]
    assert any("free space" in line or "too large" in line for line in said), said


def a_shard_file_is_damaged(run: Run, draw: random.Random) -> None:
    step = SAVE_EVERY * draw.randrange(2, (STEPS - LEAST) // SAVE_EVERY + 1)
    with run.started() as [process]:
        until(lambda: step in run.complete(), process)
        process.kill()
        codes([process])
    newest = run.workdir / "checkpoints" / str(max(run.complete()))
    shard = max(newest.glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    if draw.randrange(2):
        os.truncate(shard, draw.randrange(shard.stat().st_size // 2))
    else:
        content = bytearray(shard.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        shard.write_bytes(content)
    with run.started() as [process]:
        assert codes([process]) == [cli.USER_ERROR]
    [line] = run.place.errors(run.name)
    assert line.startswith(f"error: checkpoint {newest} can't be read") and "to go back to the one before" in line
    assert len(line) < 1000 and ("params." in line or "optimizer." in line), line  # the array
    shutil.rmtree(newest)  # as it says


def one_of_two_starts_late(run: Run, draw: random.Random) -> None:
    late = [0.0, 0.0]
    late[draw.randrange(2)] = draw.uniform(1, 5)
    with run.started(late) as processes:
        assert codes(processes) == [0, 0], run.place.errors(run.name)


def two_runs_on_one_workdir(run: Run, draw: random.Random) -> None:
    step = draw.randrange(1, STEPS - LEAST)
    with run.started() as [process]:
        until(lambda: run.place.step(run.name) >= step, process)
        process.send_signal(signal.SIGSTOP)
        second = run.place.start(run.name, *FLAGS, number=1)
        assert codes([second]) == [cli.USER_ERROR]
        [line] = run.place.errors(run.name, 1)
        assert f"{run.workdir} is in use by process {process.pid} on host" in line and "another workdir" in line
        process.kill()  # the lock ends with it
        codes([process])


def clocks_are_skewed(run: Run, draw: random.Random) -> None:
    day = 86_400
    for _ in range(2):
        step = run.place.step(run.name) + draw.randrange(1, 5)
        with run.started(skew=[draw.uniform(-day, day), draw.uniform(-day, day)]) as processes:
            until(lambda step=step: run.place.step(run.name) >= step, *processes)
            processes[draw.randrange(2)].kill()
            codes(processes)
        for path in sorted(run.workdir.rglob("*")):
            stamp = time.time() + draw.uniform(-day, day)
            os.utime(path, (stamp, stamp))


class Drill(NamedTuple):
    """What befalls a run of so many processes."""

    processes: int
    befall: Callable[[Run, random.Random], None]


DRILLS = [
    Drill(2, kill_one_of_two_in_a_step),
    Drill(2, one_of_two_is_stuck),
    Drill(1, kill_in_a_save),
    Drill(2, kill_in_a_save),
    Drill(2, sigterm_to_one_of_two),
    Drill(1, sigterm_in_compilation),
    Drill(1, sigterm_in_evaluation),
    Drill(1, sigterm_in_a_save),
    Drill(1, the_grace_ends_in_a_save),
    Drill(2, a_disk_is_full_on_one_of_two),
    Drill(1, a_shard_file_is_damaged),
    Drill(2, one_of_two_starts_late),
    Drill(1, two_runs_on_one_workdir),
    Drill(2, clocks_are_skewed),
]


@pytest.mark.parametrize("seed", range(REPEATED))
@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: f"{drill.befall.__name__}-{drill.processes}")
def test_nobody_can_tell_what_befell_a_run(place, drill, seed):
    run = Run(place, f"{drill.befall.__name__}-{drill.processes}-{seed}", drill.processes)
    drill.befall(run, random.Random(seed))
    run.goes_on()
    shutil.rmtree(run.workdir)
