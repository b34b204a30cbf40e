"""Several processes that train as one: joined before JAX is used, and none that waits for one that is gone or stuck.

Environment variables may say which process this is, as `launch --backend=local` does: JAX_COORDINATOR_ADDRESS
(host:port, of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without them JAX asks Slurm, Open MPI, GKE or
the TPU machine. FOT_JOIN_SECONDS is how long all may take to come, 300 if it is not set. With one process, all of this
does nothing.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, final

import jax

from fot import cli
from fot.errors import LostError, UserError
from fot.rollcall import EVERY, RollCall

JOIN = 300  # seconds that all processes have to come, and, at the start, to each other's word
HEARTBEAT = 60  # seconds of silence after which a process is taken for lost, and ends the others
COMPILED = 1800  # seconds between the first process and the last that have compiled a program
LEAVE = 20  # seconds that a process which is done waits for the others to be done too
AGREE = 15  # seconds that all have to tell where they are, when they are about to be ended, or end by themselves
LAST = 1.0  # seconds that the first process leaves the others for their end
SHOWN = 4  # processes, and groups of those in one place, that a line names

TERMINATED, STUCK = "terminated", "stuck"  # what all processes may be told: one is about to be terminated, or waits

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SECONDS = "FOT_JOIN_SECONDS"
# How errors of JAX, gloo and gRPC read when another process is gone.
_GONE = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Gg]loo|heartbeat|Connection (reset|closed)")
# How JAX's barriers, orbax's too, name those that didn't come.
_LATE = re.compile(r"timed out task names:\n((?:\d+\n)+)")
_NOTICE = "fot/{}/to/{}"
_ENDING = threading.Lock()  # held by the thread that ends the process
_AGAIN = f"look there, and start all again, with a larger {SECONDS} if it is only slow"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes, if there are any, for the block: the first that an entry point does.

    A process that fails ends here, at once, for the others would wait for it: with 42 if the reason is that another one
    was lost, as the same command goes on from the newest checkpoint.

    Raises:
      UserError: the environment doesn't say which process this is.
    """
    try:
        _join(os.environ)
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        _leave(error)


def is_first() -> bool:
    """Returns whether this process logs and writes for all."""
    return _state().process_id == 0


def several(environment: Mapping[str, str]) -> bool:
    """Returns whether the environment is that of one process of several."""
    if environment.keys() & {ADDRESS, COUNT, NUMBER}:
        return environment.get(COUNT) != "1"
    slurm = environment.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in environment else "1"
    counts = (slurm, environment.get("OMPI_COMM_WORLD_SIZE", "1"), environment.get("MEGASCALE_NUM_SLICES", "1"))
    if any(int(count) > 1 for count in counts) or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # JAX sets this where it finds TPU chips; how many machines share them it learns from the cloud, when it joins.
    return environment.get("TPU_ML_PLATFORM") == "JAX" and jax.config.jax_platforms != "cpu"


def settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize` that the environment gives; {} leaves all to JAX.

    Raises:
      UserError: some are missing, or make no sense.
    """
    given = {name: environment[name] for name in (ADDRESS, COUNT, NUMBER) if name in environment}
    if not given.keys() & {COUNT, NUMBER}:
        return {}  # JAX reads an address by itself
    missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
    if missing:
        raise UserError(f"{missing[0]} is not set, but {' and '.join(given)}: set all three of a process, or none")
    if not re.fullmatch(r".+:\d+", given[ADDRESS]):
        raise UserError(f"{ADDRESS}={given[ADDRESS]} must read host:port, of the first process")
    if not (given[COUNT].isdecimal() and given[NUMBER].isdecimal() and int(given[NUMBER]) < int(given[COUNT])):
        raise UserError(f"{NUMBER}={given[NUMBER]} must be a number from 0 to {COUNT}={given[COUNT]} less 1")
    return {
        "coordinator_address": given[ADDRESS],
        "num_processes": int(given[COUNT]),
        "process_id": int(given[NUMBER]),
    }


def join_seconds(environment: Mapping[str, str]) -> int:
    """Returns how long all processes may take to come; raises UserError."""
    text = environment.get(SECONDS, str(JOIN))
    if not (text.isdecimal() and int(text) > 0):
        raise UserError(f"{SECONDS}={text} must be a whole number of seconds, 1 or more")
    return int(text)


def agree(name: str, value: int, seconds: float = AGREE) -> int:
    """Returns the largest of the values that the processes give, each once for a name.

    Raises:
      LostError: some have not told theirs in time; it names them.
    """
    if _state().num_processes == 1:
        return value
    words = _words(name, str(value), seconds)
    if missing := [str(number) for number in range(_state().num_processes) if number not in words]:
        raise LostError(f"no word within {seconds:g} s from process {', '.join(missing)} of {_state().num_processes}")
    return max(map(int, words.values()))


def give_up(why: str, step: int, place: str) -> NoReturn:
    """Ends this process, with 42, because a run doesn't go on; says where each process is, first the one behind.

    Of the processes that don't find so themselves, those are told that are `told` of `STUCK`; all must come here.

    Args:
      why: what the line begins with.
      step: that this process is at.
      place: in the code, where its main thread is.
    """
    tell_all(STUCK)
    words = _words(STUCK, f"is at step {step} in {place}", AGREE)
    which = "; ".join(_positions(words, _state().num_processes))
    _end(LostError(f"{why}: {which}; the same command goes on from the newest checkpoint"), LAST if is_first() else 0)


def _positions(words: Mapping[int, str], count: int) -> list[str]:
    """Returns where those of `count` processes are that say the same: the silent, those of fewer steps, of fewer."""
    groups: dict[str, list[int]] = {}
    for number in range(count):
        groups.setdefault(words.get(number, f"has no word within {AGREE} s"), []).append(number)

    def order(group: tuple[str, list[int]]) -> tuple[int, int]:
        step = re.search(r"at step (\d+)", group[0])
        return int(step[1]) if step else -1, len(group[1])

    positions = [f"process {_names(numbers)} {word}" for word, numbers in sorted(groups.items(), key=order)]
    return positions[:SHOWN]


def _names(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return f"{shown} and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else shown


def _words(name: str, word: str, seconds: float) -> dict[int, str]:
    """Tells all processes a word, once for a name, and returns the words of those that have told theirs in time."""
    client, deadline = _state().client, time.monotonic() + seconds
    words = {}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first is gone, as the others' words will tell
        client.key_value_set(f"fot/{name}/{_state().process_id}", word)
    for number in range(_state().num_processes):
        left = max(int(1000 * (deadline - time.monotonic())), 1)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            words[number] = client.blocking_key_value_get(f"fot/{name}/{number}", left)
    return words


@final
class Barriers:
    """Barriers that all processes come to one after the other, in the same order: one that leaves some out is found.

    So one that fails, and goes on to what it does after failures, doesn't keep the others at the barriers before.
    """

    def __init__(self, name: str):
        """Args: name: of no other `Barriers` in use."""
        self._name, self._count, self._failed = name, 0, ""

    @property
    def failed(self) -> bool:
        """Whether one process has left some out: no further one waits then."""
        return bool(self._failed)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all have come.

        Raises:
          LostError: another process has come to another barrier; it names it.
          jax.errors.JaxRuntimeError: some have not come in time; `lost` names them.
        """
        if self._failed:
            raise LostError(self._failed)
        client, number = _state().client, _state().process_id
        self._count += 1
        place = f"fot/{self._name}/{self._count}"
        client.key_value_set(f"{place}/{number}", key)
        client.wait_at_barrier(place, timeout_ms)
        places = {int(path.rpartition("/")[2]): there for path, there in client.key_value_dir_get(place + "/")}
        if others := sorted(each for each, there in places.items() if there != key):
            self._failed = f"process {', '.join(map(str, others))} has failed in its part"
            raise LostError(self._failed)


def part(step: int) -> None:
    """Returns when this process may end, all having saved a step: the first one ends last, or JAX ends the others."""
    agree("saved", step)
    if is_first() and _state().num_processes > 1:
        time.sleep(LAST)


def lost(error: BaseException) -> LostError | None:
    """Returns the error if its reason is that another process is gone, None if it has one of its own."""
    if isinstance(error, LostError):
        return error
    reasons = [each for each in _chain(error) if isinstance(each, jax.errors.JaxRuntimeError)]
    gone = [each for each in reasons if _GONE.search(str(each))]
    if not gone:
        return None
    late = _LATE.search(str(gone[0]))
    which = f"process {', '.join(sorted(late[1].split(), key=int))}" if late else "another process"
    return LostError(f"{which} is gone ({_first_line(gone[0])})")


def tell_all(notice: str) -> None:
    """Tells every process, this one too, `TERMINATED` or `STUCK`."""
    if jax.distributed.is_initialized():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # then the first is gone, and the others end without
            for number in range(_state().num_processes):
                _state().client.key_value_set(_NOTICE.format(notice, number), "so", allow_overwrite=True)


@contextlib.contextmanager
def told(notice: str, call: Callable[[], None]) -> Iterator[None]:
    """Calls `call`, in a thread, if during the block any process tells all this notice."""
    if not jax.distributed.is_initialized():
        yield
        return
    key = _NOTICE.format(notice, _state().process_id)
    thread = threading.Thread(target=_listen, args=(_state().client, key, call), name=f"fot-{notice}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state().client.key_value_set(key, "over", allow_overwrite=True)
        thread.join()


def _listen(client: Any, key: str, call: Callable[[], None]) -> None:
    while True:
        try:
            if client.blocking_key_value_get(key, 3_600_000) == "so":
                call()
            return
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # JAX ends the process: the first one is gone


def _join(environment: Mapping[str, str]) -> None:
    """Joins the other processes; a join that takes too long ends the process with 42."""
    if not several(environment):
        return
    values, seconds = settings(environment), join_seconds(environment)
    # It would hear of nothing but SIGTERM, in the place of `fot.termination`, which says more.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own end of a late join is a crash that names nobody.
    joined = threading.Event()
    threading.Thread(target=_call_roll, args=(seconds, joined), name="fot-rollcall", daemon=True).start()
    try:
        jax.distributed.initialize(
            **values,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVE,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"can't join the other processes ({_first_line(error)}): set {COUNT}=1 if there are none, else that, "
            f"{ADDRESS} and {NUMBER}"
        ) from None
    finally:
        joined.set()


def _call_roll(seconds: int, joined: threading.Event) -> None:
    """Ends the process, with 42, if it has not joined the others in time; says who is missing."""
    deadline, state = time.monotonic() + seconds, _state()
    while state.client is None:  # JAX has yet to learn which process this is
        if joined.wait(0.1):
            return
        if time.monotonic() > deadline:
            _end(LostError(f"this process has waited {seconds} s to learn which one of them it is: {_AGAIN}"))
    number, address = state.process_id, state.coordinator_address
    try:
        roll = RollCall(address, state.num_processes, number)
    except OSError as error:
        roll, missing = None, f"the others ({error.strerror})"
    with roll or contextlib.nullcontext():
        while (left := deadline - time.monotonic()) > 0:
            if joined.wait(left) if roll is None else roll.call(min(EVERY, left)) or joined.is_set():
                break
        if joined.is_set():
            return
        if roll is not None:
            roll.give_up()
            missing = f"process {', '.join(map(str, roll.missing))}" if roll.missing else "one that was there"
    which = f"process {number} of {state.num_processes}"
    _end(LostError(f"{which}: {missing} did not come to {address} within {seconds} s: {_AGAIN}"))


def _leave(error: BaseException) -> NoReturn:
    """Ends the process with the exit code of an error, without JAX's wait for the others."""
    _end(lost(error) or error)


def _end(error: BaseException, after: float = 0) -> NoReturn:
    """Ends the process with the exit code of an error, the first of several, so many seconds after it is told."""

    def fail() -> None:
        raise error

    _ENDING.acquire()
    code = 1
    try:
        code = cli.RETRY if isinstance(error, LostError) and cli.exit_code(fail) else cli.exit_code(fail)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        time.sleep(after)
        os._exit(code)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _state() -> Any:
    """Returns what JAX knows of the processes, before any use of a device; it has no public name."""
    return jax._src.distributed.global_state
