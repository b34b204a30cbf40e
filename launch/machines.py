"""Machines of a queued resource, from the request to the last of them deleted, while a job runs on them."""

import contextlib
import dataclasses
import time
from typing import final

from fot.errors import UserError
from launch import queued, record, shell
from launch.job import RETRY, Job, exit_code
from launch.queued import ACTIVE, FAILED, GONE, RUNNING, STOPPED, TAKEN, WAITING, Place


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long each step may take, in seconds.

    Attributes:
      poll: between two looks at the state.
      answer: of gcloud.
      copy: for the source to reach all machines.
      setup: of a machine.
      settle: for the other processes to end after the first one has.
      silence: of the service or the machines, until that is an error.
      delete: of the machines.
    """

    poll: float = 20.0
    answer: float = 180.0
    copy: float = 900.0
    setup: float = 1800.0
    settle: float = 120.0
    silence: float = 900.0
    delete: float = 900.0


PATIENCE = Patience()
MINUTE = 60.0


@final
class Preempted(Exception):
    """The machines were taken away; the message says how it is known."""


@final
class Run:
    """One job under way: its steps, each of which notices when the machines have been taken away."""

    def __init__(self, job: Job, place: Place, patience: Patience):
        self.job, self.place, self.patience = job, place, patience
        self._lines = 0  # of the log, that have been shown

    def until_it_ends(self, there: bool = False) -> int:
        """Makes machines, trains, and does so again after terminations; returns the job's exit code.

        Args:
          there: a launcher that was killed has left its request: what it had begun goes on.
        """
        made = trains = False
        if there:
            made, trains = self._left()
        for attempt in range(self.job.retries + 1):
            if attempt:
                _say(f"starting again ({attempt} of {self.job.retries})")
            try:
                if not made:
                    self._make()
                    made = True
                if not trains:
                    self._step(queued.on_all(self.job, self.place, queued.start(self.job)), self.patience.answer)
                trains = False
                _say("training")
                code = self._follow()
            except Preempted as reason:
                _say(f"{reason}: the machines are made again")
                self.remove()
                made = False
                continue
            if code == STOPPED:
                _say("stopped")
                return RETRY
            if code != RETRY:
                _say("done" if code == 0 else f"failed with exit code {code}")
                return code
            _say("terminated, and saved")
        raise UserError(
            f"terminated {self.job.retries + 1} times: --retries={self.job.retries} allows no further start"
        )

    def remove(self) -> None:
        """Deletes the request with its machines, and makes sure of it.

        Raises:
          UserError: they may still be there; the message has the command to delete them by.
        """
        command = queued.remove(self.job, self.place)
        deadline = time.monotonic() + self.patience.delete
        _say(f"deleting {self.job.name}")
        while True:
            done = shell.run(command, self.patience.delete)
            state = queued.state(self.job, self.place, self.patience.answer)
            if state is not None and state.name == GONE:
                return
            if time.monotonic() > deadline:
                reason = done.reason if done.code else state.name if state else "no answer"
                raise UserError(f"{self.job.name} may still be there, and cost ({reason}): {shell.line(command)}")
            time.sleep(self.patience.poll)

    def _left(self) -> tuple[bool, bool]:
        """Returns whether machines are set up, and train; those that are neither, but there, are deleted."""
        state = self._state()
        try:
            if state.name in WAITING:
                self._set_up()
                return True, False
            started = queued.on_all(self.job, self.place, queued.started(self.job))
            if state.name == ACTIVE and not shell.run(started, self.patience.answer).code:
                return True, True
        except Preempted as reason:
            _say(f"{reason}: the machines are made again")
        self.remove()
        return False, False

    def _make(self) -> None:
        """Requests the machines, waits for them, and sets them up."""
        shell.must(queued.create(self.job, self.place), self.patience.answer)
        self._set_up()

    def _set_up(self) -> None:
        """Waits for the machines, and sets them up."""
        job, place, patience = self.job, self.place, self.patience
        self._await()
        self._lines = 0
        if not job.image:
            with record.packed(record.source()) as path:
                self._step(queued.copy(job, place, path), patience.copy)
        _say("setting up")
        self._step(queued.on_all(job, place, queued.prepare(job)), patience.setup)

    def _await(self) -> None:
        """Waits until the request is ACTIVE."""
        deadline, last = time.monotonic() + MINUTE * self.place.wait_minutes, ""
        while (state := self._state()).name != ACTIVE:
            if state.name != last:
                _say(state.name)
            last = state.name
            self._refuse(state)
            if time.monotonic() > deadline:
                raise UserError(
                    f"{last} after {self.place.wait_minutes} minutes: raise --wait_minutes, or another --zone"
                )
            time.sleep(self.patience.poll)
        _say(ACTIVE)

    def _refuse(self, state: queued.State) -> None:
        """Raises Preempted or UserError if a state doesn't lead to ACTIVE."""
        if state.name in TAKEN:
            raise Preempted(state.name)
        if state.name == FAILED:
            raise UserError(f"the request failed: {state.detail or 'the service gives no reason'}")
        if state.name not in WAITING:
            raise UserError(f"the machines are {state.name}: somebody has deleted them")

    def _state(self) -> queued.State:
        """Returns the state, waiting through silence.

        Raises:
          UserError: the service has not told it for too long.
        """
        deadline = time.monotonic() + self.patience.silence
        while (state := queued.state(self.job, self.place, self.patience.answer)) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"gcloud has not told the state of {self.job.name} for {self.patience.silence:g} seconds"
                )
            time.sleep(self.patience.poll)
        return state

    def _check(self) -> None:
        """Raises as `_refuse` does unless the machines are there."""
        if (state := self._state()).name != ACTIVE:
            self._refuse(state)
            raise Preempted(state.name)

    def _step(self, argv: list[str], timeout: float) -> str:
        """Runs one command on the machines and returns its output."""
        done = shell.run(argv, timeout)
        if done.code:
            self._check()
            raise UserError(f"{shell.name(argv[:5])}: {done.reason}")
        return done.out

    def _follow(self) -> int:
        """Shows the log until training has ended everywhere, and returns what its exit codes come to."""
        deadline = time.monotonic() + self.patience.silence
        while True:
            began = self._lines
            follower = shell.Lines(
                queued.on_first(self.job, self.place, queued.follow(self.job, self._lines + 1)), self._show
            )
            with contextlib.closing(follower):
                while not follower.wait(self.patience.poll):
                    self._check()
            self._check()
            found = self._codes()
            if found and RUNNING in found and found.count(RUNNING) < len(found):
                found = self._settled()
            if found and RUNNING not in found:
                return STOPPED if STOPPED in found else exit_code(found)
            # The connection broke, and the machines don't answer or train on.
            if found or self._lines > began:
                deadline = time.monotonic() + self.patience.silence
            elif time.monotonic() > deadline:
                raise UserError(f"the machines have not answered for {self.patience.silence:g} seconds")
            time.sleep(self.patience.poll)

    def _settled(self) -> list[int]:
        """Returns the exit codes when all processes have ended; those that don't in time are killed."""
        deadline = time.monotonic() + self.patience.settle
        while RUNNING in (found := self._codes()) or not found:
            if time.monotonic() > deadline:
                self._step(queued.on_all(self.job, self.place, queued.kill(self.job)), self.patience.answer)
                return self._codes()
            self._check()
            time.sleep(self.patience.poll)
        return found

    def _codes(self) -> list[int]:
        """Returns the exit code of every process, RUNNING for those that have none; [] if a machine didn't answer."""
        done = shell.run(queued.on_all(self.job, self.place, queued.report(self.job)), self.patience.answer)
        found = queued.codes(done.out)
        return found if not done.code and len(found) == self.job.hosts else []

    def _show(self, line: str) -> None:
        self._lines += 1
        print(line, flush=True)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
