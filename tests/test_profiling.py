"""Properties of traces and of the watch over a run's speed."""

import pathlib
import re
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from fot import profiling
from fot.errors import UserError
from fot.profiling import Ends, Span, Trace, Watch
from fot.termination import Termination


def test_spans_of_steps():
    assert profiling.span("") is None
    assert profiling.span("10:13") == Span(10, 13)
    for text in ("10", "10:", ":3", "3:3", "5:3", "-1:3", "a:b", "1:2:3"):
        with pytest.raises(UserError, match=r"--profile=.* must read start:stop") as error:
            profiling.span(text)
        assert "\n" not in str(error.value)


def traced(folder: pathlib.Path, steps: Span | None, count: int) -> list[bytes]:
    """Runs so many steps, and returns the traces written."""
    work, x = jax.jit(lambda x: x @ x / 64), jnp.ones((64, 64))
    with Trace(steps, folder) as trace:
        for number in range(count):
            with trace.step(number, x):
                x = work(x)
    return [path.read_bytes() for path in folder.rglob("*.xplane.pb")]


def test_a_trace_is_of_its_steps_alone(tmp_path):
    [trace] = traced(tmp_path, Span(2, 4), 6)
    assert b"train" in trace
    jax.profiler.ProfileData.from_serialized_xspace(trace)


def test_a_trace_under_way_at_the_end_is_written(tmp_path):
    assert len(traced(tmp_path, Span(2, 40), 4)) == 1


@pytest.mark.parametrize("steps", [None, Span(7, 9)])
def test_without_steps_of_its_own_nothing_is_written(tmp_path, steps):
    assert traced(tmp_path, steps, 4) == [] and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "profile").write_text("")
    with pytest.raises(UserError, match="can't write .*profile"):
        traced(tmp_path, Span(0, 2), 4)


def test_a_stretch_that_takes_ten_times_the_median_leaves_all_stacks(tmp_path):
    lines = []
    told = threading.Event()

    def log(line):
        lines.append(line)
        told.set()

    with Watch(tmp_path / "hang.txt", log, least=0.0) as watch:
        for _ in range(5):
            watch.begin()
            time.sleep(0.05)
            watch.end()
        assert not lines
        watch.begin()
        waits_here(told)
        watch.end()
        watch.begin()
        time.sleep(0.05)
        watch.end()
    [line] = lines
    assert "hanging?" in line and str(tmp_path / "hang.txt") in line and "\n" not in line
    report = (tmp_path / "hang.txt").read_text()
    assert "waits_here" in report and report.count("hread 0x") >= 2


def waits_here(told: threading.Event) -> None:
    assert told.wait(60)


def test_a_watch_needs_to_know_what_is_usual_and_not_what_lies_between(tmp_path):
    lines = []
    with Watch(tmp_path / "hang.txt", lines.append, least=0.0) as watch:
        for seconds in (0.001, 0.001, 0.2):  # no median yet
            watch.begin()
            time.sleep(seconds)
            watch.end()
        time.sleep(0.2)
    assert not lines and not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_is_told(tmp_path):
    lines = []
    told = threading.Event()

    def log(line):
        lines.append(line)
        told.set()

    with Watch(tmp_path / "no" / "hang.txt", log, least=0.0) as watch:
        for _ in range(3):
            watch.begin()
            time.sleep(0.05)
            watch.end()
        watch.begin()
        assert told.wait(60)
        watch.end()
    assert "can't be written" in lines[0]


def test_short_stretches_are_no_hang(tmp_path):
    lines = []
    with Watch(tmp_path / "hang.txt", lines.append) as watch:
        for seconds in (0.001, 0.001, 0.001, 0.2):
            watch.begin()
            time.sleep(seconds)
            watch.end()
    assert not lines


def ended(folder: pathlib.Path, seconds: float, least: float, stretches: int) -> tuple[list[tuple], list[str]]:
    """Watches so many short stretches and then one that hangs; returns how the run was ended, and what was logged."""
    calls, lines = [], []
    told = threading.Event()

    def give_up(*call):
        calls.append(call)
        told.set()

    with Watch(folder / "hang.txt", lines.append, least=least, ends=Ends(seconds, give_up)) as watch:
        for number in range(stretches):
            watch.begin()
            watch.step = number
            time.sleep(0.01)
            watch.end()
        watch.begin()
        told.wait(1)
    return calls, lines


def test_what_hangs_for_longer_is_ended_once(tmp_path):
    calls, lines = ended(tmp_path, seconds=0.4, least=0.1, stretches=profiling.KNOWN)
    [(why, step, place)] = calls
    assert why.startswith("nothing has come for 0.4") and step == profiling.KNOWN - 1
    assert re.fullmatch(r"other code \(threading\.py, line \d+\)", place)  # the main thread is in this test, not fot
    assert len(lines) == 1 and "hanging?" in lines[0]  # reported before


def test_nothing_is_ended_sooner_than_told(tmp_path):
    known = profiling.KNOWN
    assert ended(tmp_path, seconds=2.0, least=0.1, stretches=known)[0] == []  # it may take two seconds
    assert ended(tmp_path, seconds=0.1, least=1.0, stretches=known)[0] == []  # it may take twice as long as a report
    assert ended(tmp_path, seconds=0.0, least=0.1, stretches=known)[0] == []  # never
    assert ended(tmp_path, seconds=0.5, least=0.1, stretches=0)[0] == []  # nobody knows what is usual


def test_what_takes_an_unknown_time_is_ended_later(tmp_path):
    [(why, step, _)], lines = ended(tmp_path, seconds=0.1, least=10.0, stretches=0)
    assert why.startswith("nothing has come for 0.4") and step == 0 and not lines


def test_a_place_is_in_this_package_and_in_what_it_has_called(tmp_path):
    calls = []
    termination = Termination()
    with Watch(tmp_path / "hang.txt", print, least=0.0, ends=Ends(0.1, lambda *call: calls.append(call))) as watch:
        for _ in range(profiling.KNOWN):
            watch.begin()
            watch.end()
        watch.begin()
        with termination.halted(lambda: calls, 0.5):
            pass
    [(_, _, place)] = calls
    assert re.fullmatch(r"fot/termination\.py, line \d+ \(threading\.py, line \d+\)", place)
