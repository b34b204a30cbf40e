"""Running the trials of a sweep, some at a time, each as a job of `launch.pod`."""

import collections
import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import sys
import time
from typing import TextIO, final

from fot import bucket, files
from fot.errors import UserError
from launch import job as jobs
from launch import points, record, signals
from launch.group import Command, Group
from launch.job import GRACE, LOST, RESTARTS
from launch.space import Sweep
from launch.trials import Trial, Trials, read_curve

POLL = 0.2  # seconds between two looks at what runs
PAUSE = 1.0  # seconds between two looks for trials that others may have left, and at the claims
READ = 10.0  # seconds between two looks at the metrics in a bucket
PATIENCE = GRACE + 15  # seconds that a job has to stop: its own, and some for its launcher
LEAVING = 1800.0  # the same for one of another machine, which is deleted besides
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
      trials: folder of the trials' workdirs, or bucket and folder.
      backend: that runs them.
      job: words of launch.pod that describe a job.
      parallel: trials at a time.
    """

    sweep: Sweep
    fixed: points.Texts
    name: str
    workdir: pathlib.Path
    trials: str
    backend: str
    job: tuple[str, ...]
    parallel: int

    @property
    def local(self) -> bool:
        """Whether the trials run on this machine, and end with this command."""
        return self.backend == "local"

    def folder(self, key: str) -> pathlib.Path:
        """Returns where the log of a trial is."""
        return self.workdir / "trials" / key

    def place(self, key: str) -> str:
        """Returns the workdir of a trial."""
        return f"{self.trials}/{key}"

    def command(self, key: str, overrides: points.Texts) -> list[str]:
        """Returns the words of launch.pod for a trial."""
        own = points.words({**self.fixed, **overrides})
        # Clusters know a job by its name alone: no other sweep has the same, nor this one in another workdir.
        place = self.place(key) if bucket.is_bucket(self.trials) else os.path.abspath(self.place(key))
        number = hashlib.sha256(f"{self.name} {place}".encode()).hexdigest()[: points.DIGITS]
        named = () if self.local else ("--wait", f"--name={jobs.default_name(number + key[points.DIGITS :])}")
        return [*self.job, f"--config={self.sweep.base}", *own, f"--workdir={self.place(key)}", *named]


@dataclasses.dataclass
class _Running:
    """A trial under way.

    Attributes:
      trial: of the storage.
      group: its launcher.
      log: what that says.
      stored: how many of its metrics are.
      size: of the file of its metrics when it was read.
      read: when, of a bucket.
      removes: whether its launcher only deletes what is left of a job that was stopped.
      pruned: when its launcher is killed, as it was told to end and didn't; inf if it wasn't told.
    """

    trial: Trial
    group: Group
    log: TextIO
    removes: bool = False
    stored: int = 0
    size: int = -1
    read: float = -math.inf
    pruned: float = math.inf


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
            # By what a killed sweep has left, which is about to end.
            if self._plan.local and _in_use(pathlib.Path(self._plan.place(trial.id))):
                busy.add(trial.id)
                self._trials.release(trial)
                continue
            again = ", again" if (folder / LOG).exists() else ""
            folder.mkdir(parents=True, exist_ok=True)
            log = open(folder / LOG, "a", encoding="utf-8", errors="replace")
            removes = bool(again) and self._stopped(trial)  # while no sweep ran
            delete = ["delete", f"--workdir={self._plan.place(trial.id)}"]
            words = delete if removes else self._plan.command(trial.id, trial.overrides)
            argv = [sys.executable, "-m", "launch.pod", *words]
            grace = PATIENCE if self._plan.local else LEAVING
            group = Group([Command(argv, {})], lambda _, line, log=log: print(line, file=log, flush=True), grace)
            self._running.append(_Running(trial, group, log, removes))
            if not removes:
                _say(trial, f"started{again}")

    def _advance(self, running: _Running) -> bool:
        """Stores new metrics, and tells the trial to end if it should; returns whether it is finished."""
        code = running.group.codes[0]
        if running.pruned < math.inf:
            return self._pruned(running, over=code is not None)
        if code is None and not self._grown(running):
            return False
        try:
            curve = read_curve(self._metrics(running.trial), self._plan.sweep.metric)
        except UserError as error:  # of a bucket, which may be back
            if code is None:
                return False
            code, curve = code or LOST, {}
            _say(running.trial, str(error))
        prune = len(curve) > running.stored and self._trials.report(running.trial, curve)
        running.stored = len(curve)
        if code is None and prune:
            running.group.terminate()  # and the others are looked at meanwhile
            running.pruned = time.monotonic() + (PATIENCE if self._plan.local else LEAVING)
        if code is None:
            return False
        self._end([running])
        last = curve[max(curve)] if curve else None
        if prune:
            self._finish(running.trial, "PRUNED", last, "")
        elif running.removes or (code and self._stopped(running.trial)):
            self._finish(running.trial, "FAIL", None, "stopped by launch.pod stop")
        elif code in RESTARTS and self._kills[running.trial.id] < KILLS:
            self._kills[running.trial.id] += 1
            self._trials.release(running.trial)
            _say(running.trial, f"ended with {code}, goes on")
        elif code:
            log = self._plan.folder(running.trial.id) / LOG
            self._finish(running.trial, "FAIL", None, f"exit code {code}, see {log}")
        elif last is None or math.isnan(last):
            missing = "missing" if last is None else "not finite"
            why = f"{self._plan.sweep.metric} is {missing} in {self._metrics(running.trial)}"
            self._finish(running.trial, "FAIL", None, why)
        else:
            self._finish(running.trial, "COMPLETE", last, "")
        return True

    def _pruned(self, running: _Running, over: bool) -> bool:
        """Finishes a trial that was told to end, once it has or its time is up; returns whether it is finished."""
        if not over and time.monotonic() < running.pruned:
            return False
        if not over:
            running.group.kill()
        self._end([running])
        curve = next(trial.curve for trial in self._trials.all() if trial.id == running.trial.id)
        self._finish(running.trial, "PRUNED", curve[max(curve)], "")
        return True

    def _stopped(self, trial: Trial) -> bool:
        """Returns whether somebody has ended the trial's job for good."""
        try:
            return record.stopped(self._plan.place(trial.id))
        except UserError:  # of a bucket that doesn't answer, or a folder that the launcher complains of
            return False

    def _metrics(self, trial: Trial) -> str:
        return f"{self._plan.place(trial.id)}/{METRICS}"

    def _grown(self, running: _Running) -> bool:
        """Returns whether there may be new metrics."""
        path = self._metrics(running.trial)
        if bucket.is_bucket(path):
            if time.monotonic() - running.read < READ:
                return False
            running.read = time.monotonic()
            return True
        size = os.stat(path).st_size if os.path.exists(path) else 0
        grown, running.size = size != running.size, size
        return grown

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
