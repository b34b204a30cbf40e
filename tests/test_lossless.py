"""A run that is killed, terminated, interrupted or out of disk goes on, and nobody can tell it from a whole one."""

import os
import random
import resource
import signal
import time

import jax
import numpy as np
import pytest

from fot import cli, files, metrics, train, trained
from fot.errors import UserError
from fot.evaluate import perplexity
from tests.trainings import Place, place_in, state_of, timeless, until

SAVE_EVERY = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """A place of runs, and a run "whole" that nothing interrupts; what it compiled is cached for others."""
    there = place_in(tmp_path_factory.mktemp("lossless"), steps=60, save_every=SAVE_EVERY)
    assert there.start("whole").wait() == 0, there.errors("whole")
    return there


def assert_nobody_can_tell(place: Place, workdir: str) -> None:
    """Every loss, norm, d and batch, parameters, optimizer and data position, and the names of what is on disk."""
    assert place.metrics(workdir) == place.metrics("whole")
    assert place.saves(workdir) == place.saves("whole")
    assert set(os.listdir(place.folder / workdir)) == set(os.listdir(place.folder / "whole"))
    here, there = state_of(place.folder / workdir), state_of(place.folder / "whole")
    assert here.data_position == there.data_position
    assert jax.tree.structure(here.state) == jax.tree.structure(there.state)
    for left, right in zip(jax.tree.leaves(here.state), jax.tree.leaves(there.state), strict=True):
        assert left.dtype == right.dtype and np.asarray(left).tobytes() == np.asarray(right).tobytes()


def kill_again_and_again(place: Place, workdir: str, in_run: int, in_save: int, seed: int) -> None:
    """Kills the run at seeded moments, `in_run` anywhere and `in_save` inside a save, and lets it end then.

    The moments are steps of the run and a delay after them: the first lies before the first step.
    """
    draw = random.Random(seed)
    kinds = draw.sample(["run"] * in_run + ["save"] * in_save, in_run + in_save)
    steps = sorted(draw.sample(range(60 - 3 * SAVE_EVERY), len(kinds)))
    halves = 0
    for kind, step in zip(kinds, steps, strict=True):
        process, before = place.start(workdir), place.saves(workdir)
        if kind == "run":
            until(lambda step=step: place.step(workdir) >= step, process)
            time.sleep(draw.uniform(0, 0.1))
        else:

            def saving(step=step, before=before) -> bool:
                new = set(place.saves(workdir)) - set(before)
                return any("tmp" in name and int(name.split(".")[0]) > step for name in new)

            until(saving, process)
            time.sleep(draw.choice([0, draw.uniform(0, 0.05)]))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        halves += kind == "save" and any("tmp" in name for name in place.saves(workdir))
    assert halves > 0, "no kill hit a save"
    process = place.start(workdir)
    assert process.wait() == 0, place.errors(workdir)


@pytest.mark.slow
def test_a_killed_run_cannot_be_told_from_a_whole_one(place):
    kill_again_and_again(place, "killed", in_run=2, in_save=2, seed=0)
    assert_nobody_can_tell(place, "killed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_run_killed_twenty_times_cannot_be_told_from_a_whole_one(place, seed):
    kill_again_and_again(place, f"killed-{seed}", in_run=10, in_save=10, seed=seed)
    assert_nobody_can_tell(place, f"killed-{seed}")


def test_sigterm_saves_and_asks_for_another_try_and_ctrl_c_saves_nothing(place):
    steps = 10_000  # more than it gets to do
    rare = [f"--config.train.steps={steps}", f"--config.train.checkpoint_every={steps}", "--config.train.keep_every=0"]
    out = place.said("ended", "out")
    process = place.start("ended", *rare)
    until(lambda: "training documents" in out.read_text(), process)
    process.terminate()  # while it compiles: nothing to save
    assert process.wait() == cli.RETRY and place.saves("ended") == []
    assert [line.split(":")[0] for line in place.errors("ended")] == ["terminated"]

    process = place.start("ended", *rare)
    until(lambda: place.step("ended") >= 5, process)
    with pytest.raises(UserError, match=rf"ended is in use by process {process.pid} on host .*another workdir"):
        config = cli.parse(place.flags("ended"), train.Flags, "").config
        train.train(config, place.folder / "ended", print)
    process.terminate()
    process.terminate()
    until(lambda: any("tmp" in name for name in place.saves("ended")) or process.poll() is not None, process)
    process.terminate()
    assert process.wait() == cli.RETRY, place.errors("ended")
    (saved,) = map(int, place.saves("ended"))
    assert saved >= 5 and place.metrics("ended")[-1]["step"] == saved

    process = place.start("ended", *rare)
    until(lambda: place.step("ended") >= saved + 5, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == cli.INTERRUPTED and place.errors("ended") == ["interrupted"]
    assert place.saves("ended") == [str(saved)]
    *before, last = zip(place.metrics("ended"), place.metrics("whole"), strict=False)
    assert all(ended == whole for ended, whole in before)
    assert last[0].items() <= last[1].items()  # Ctrl-C may come between a step and its held-out loss


def test_a_full_disk_at_a_save_ends_the_run_in_one_line_and_keeps_the_checkpoint_before(place):
    process = place.start("full", "--config.train.log_every=1000", "--config.train.evaluate_every=0")
    until(lambda: str(SAVE_EVERY) in place.saves("full"), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    assert process.wait() == cli.USER_ERROR, place.errors("full")
    (line,) = place.errors("full")
    assert line.startswith("error: the checkpoint of step") and str(place.folder / "full") in line
    assert "free space" in line
    left = [int(name) for name in place.saves("full") if name.isdigit()]
    assert int(state_of(place.folder / "full").state.step) == max(left) >= SAVE_EVERY


def test_a_workdir_in_use_can_be_evaluated(place):
    flags = perplexity.Flags(workdir=str(place.folder / "whole"))
    before = place.saves("whole")
    with files.hold(place.folder / "whole"):
        perplexity.main(trained.config_named(flags), flags)
    assert (place.folder / "whole" / "perplexity.json").exists() and place.saves("whole") == before
    for name in ("perplexity.json", "perplexity.png"):
        (place.folder / "whole" / name).unlink()


class _Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_interrupted_at_every_step_cannot_be_told_from_a_whole_one(place, tmp_path, monkeypatch):
    flags = [*place.flags("whole"), "--config.train.steps=4"]
    flags += ["--config.train.evaluate_every=2", "--config.train.checkpoint_every=2"]
    flags += ["--config.crossbatch.d=2", "--config.crossbatch.d_schedule=constant"]
    config = cli.parse(flags, train.Flags, "").config
    whole = train.train(config, tmp_path / "whole", lambda line: None)
    write, stop_before = train.MetricsWriter.write, [0, ""]

    def stop(self, step, values):
        if step == stop_before[0] and stop_before[1] in values:
            raise _Stop
        write(self, step, values)

    monkeypatch.setattr(train.MetricsWriter, "write", stop)
    # At even steps there is a checkpoint when the losses that belong to it are not there yet: the next start owes them.
    for stop_before[:] in [(1, "loss"), (2, "held_out/loss"), (3, "loss"), (4, "held_out/loss")]:
        with pytest.raises(_Stop):
            train.train(config, tmp_path / "stopped", lambda line: None)
    stop_before[:] = 0, ""
    stopped = train.train(config, tmp_path / "stopped", lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, stopped, whole)
    left, right = (timeless(tmp_path / name / metrics.FILE) for name in ("stopped", "whole"))
    assert left == right and len(left) == 4 and "held_out/loss" in left[-1]
