"""Running the trials of a sweep, some at a time, each as a job of `launch.pod`."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from typing import TextIO, final

from fot import files
from fot.errors import UserError
from launch import points, signals
from launch.group import Command, Group
from launch.job import GRACE, RESTARTS
from launch.space import Sweep
from launch.trials import Trial, Trials, read_curve

POLL = 0.2  # seconds between two looks at what runs
PAUSE = 1.0  # seconds between two looks for trials that others may have left, and at the claims
PATIENCE = GRACE + 15  # seconds that a job has to stop: its own, and some for its launcher
KILLS = 3  # times that a trial goes on after its launcher was killed
LOG, METRICS = "trial.log", "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked sweep.

    Attributes:
      sweep: what the file says.
      fixed: texts of the overrides that all trials share.
      name: of the study, the same for the same sweep.
      workdir: folder.
      job: words of launch.pod that describe a job.
      parallel: trials at a time.
    """

    sweep: Sweep
    fixed: points.Texts
    name: str
    workdir: pathlib.Path
    job: tuple[str, ...]
    parallel: int

    def folder(self, key: str) -> pathlib.Path:
        """Returns the workdir of a trial."""
        return self.workdir / "trials" / key

    def command(self, key: str, overrides: points.Texts) -> list[str]:
        """Returns the words of launch.pod for a trial."""
        own = points.words({**self.fixed, **overrides})
        return [*self.job, f"--config={self.sweep.base}", *own, f"--workdir={self.folder(key)}"]


@dataclasses.dataclass
class _Running:
    """A trial under way: its job, its log, and how many of its metrics are stored."""

    trial: Trial
    group: Group
    log: TextIO
    stored: int = 0
    size: int = -1


@final
class Worker:
    """Runs what trials there are, until all are finished, by whomever."""

    def __init__(self, made: Plan, trials: Trials):
        self._plan, self._trials, self._running = made, trials, list[_Running]()
        self._kills = collections.Counter[str]()

    def until_it_ends(self) -> int:
        """Returns the exit code; whatever ends it, no job of its own runs then."""
        looked = -math.inf
        with signals.interrupting(), contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            while True:
                ended = [each for each in list(self._running) if self._advance(each)]
                if ended or time.monotonic() - looked > PAUSE:
                    looked = time.monotonic()
                    self._trials.check()
                    self._start()
                    if not self._running and self._trials.over():
                        break
                time.sleep(POLL)
        return self._summary()

    def _start(self) -> None:
        """Starts trials until there are as many as there may be."""
        busy: set[str] = set()
        while len(self._running) < self._plan.parallel:
            trial = self._trials.claim(busy)
            if trial is None:
                return
            folder = self._plan.folder(trial.id)
            if _in_use(folder):  # by what a killed sweep has left, which is about to end
                busy.add(trial.id)
                self._trials.release(trial)
                continue
            again = ", again" if (folder / LOG).exists() else ""
            folder.mkdir(parents=True, exist_ok=True)
            log = open(folder / LOG, "a", encoding="utf-8", errors="replace")
            argv = [sys.executable, "-m", "launch.pod", *self._plan.command(trial.id, trial.overrides)]
            group = Group([Command(argv, {})], lambda _, line, log=log: print(line, file=log, flush=True), PATIENCE)
            self._running.append(_Running(trial, group, log))
            _say(trial, f"started{again}")

    def _advance(self, running: _Running) -> bool:
        """Stores new metrics, and finishes the trial if it has ended or should; returns whether it did."""
        code = running.group.codes[0]
        path = self._plan.folder(running.trial.id) / METRICS
        size = path.stat().st_size if path.exists() else 0
        if code is None and size == running.size:
            return False
        running.size = size
        curve = read_curve(path, self._plan.sweep.metric)
        prune = len(curve) > running.stored and self._trials.report(running.trial, curve)
        running.stored = len(curve)
        if code is None and not prune:
            return False
        self._end([running])
        last = curve[max(curve)] if curve else None
        if code is None:
            self._finish(running.trial, "PRUNED", last, "")
        elif code in RESTARTS and self._kills[running.trial.id] < KILLS:
            self._kills[running.trial.id] += 1
            self._trials.release(running.trial)
            _say(running.trial, f"ended with {code}, goes on")
        elif code:
            log = self._plan.folder(running.trial.id) / LOG
            self._finish(running.trial, "FAIL", None, f"exit code {code}, see {log}")
        elif last is None or math.isnan(last):
            why = f"{self._plan.sweep.metric} is {'missing' if last is None else 'not finite'} in {path}"
            self._finish(running.trial, "FAIL", None, why)
        else:
            self._finish(running.trial, "COMPLETE", last, "")
        return True

    def _finish(self, trial: Trial, state: str, value: float | None, why: str) -> None:
        self._trials.finish(trial, state, value, why)
        words = {"PRUNED": "pruned", "COMPLETE": "complete", "FAIL": "failed"}[state]
        _say(trial, f"{words}, {self._plan.sweep.metric} {value:.4g}" if value is not None else f"{words}: {why}")

    def _stop(self) -> None:
        """Ends all jobs, at once; their trials stay as they are, to go on."""
        with signals.undisturbed():
            self._end(list(self._running))

    def _end(self, which: list[_Running]) -> None:
        for each in which:
            each.group.terminate()
        for each in which:
            each.group.__exit__()
            each.log.close()
            self._running.remove(each)

    def _summary(self) -> int:
        found = self._trials.all()
        states = [trial.state for trial in found]
        print(f"{len(found)} trials: {states.count('COMPLETE')} complete, {states.count('PRUNED')} pruned, ", end="")
        print(f"{states.count('FAIL')} failed; python -m launch.sweep report --workdir={self._plan.workdir}")
        return int("FAIL" in states)


def _say(trial: Trial, what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {trial.id} {what}", flush=True)


def _in_use(folder: pathlib.Path) -> bool:
    """Returns whether a launcher or a training holds the folder."""
    try:
        for each in (folder / "launch", folder):
            if (each / files.LOCK).exists():
                with files.hold(each):
                    pass
    except UserError:
        return True
    return False
