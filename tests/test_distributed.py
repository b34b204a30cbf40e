"""Several processes: how one learns which it is, what they agree on, and that none waits for one that is gone."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from fot import distributed
from fot.errors import CheckpointError, LostError, UserError

ROOT = pathlib.Path(__file__).parent.parent
SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (EXPLICIT, True),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # a batch script, before srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, True),
    ],
)
def test_who_is_one_of_several(environment, several):
    assert distributed.several(environment) == several


def test_tpu_machines_are_known_by_what_jax_says_of_them():
    script = "import jax, os; from fot import distributed as d; print(d.several(os.environ))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    variables = {**plain, "JAX_FORCE_TPU_INIT": "1", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "tpu,cpu"}
    found = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr


def test_settings_are_those_of_the_environment():
    wanted = {"coordinator_address": "host:1234", "num_processes": 3, "process_id": 2}
    assert distributed.settings(EXPLICIT) == wanted
    assert distributed.settings(SLURM) == distributed.settings({"JAX_COORDINATOR_ADDRESS": "host:1234"}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID is not set, but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host must read host:port"),
        ({"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID=3 must be a number from 0 to JAX_NUM_PROCESSES=3 less 1"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_PROCESS_ID=2 must be a number from 0 to JAX_NUM_PROCESSES=two"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    changed = {name: value for name, value in (EXPLICIT | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        distributed.settings(changed)


def test_a_process_alone_agrees_with_itself():
    assert distributed.agree("step", 7) == 7 and distributed.is_first()
    distributed.tell_all(distributed.STUCK)
    with distributed.told(distributed.STUCK, lambda: 1 / 0), distributed.joined():
        pass


def test_errors_for_want_of_another_process_are_told_from_others():
    gone = jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer\nmore")
    try:
        raise CheckpointError("not saved") from gone
    except CheckpointError as error:
        assert str(distributed.lost(error)) == "another process is gone (UNAVAILABLE: Connection reset by peer)"
    barrier = "DEADLINE_EXCEEDED: Barrier timed out. Id: b::0.\nSome timed out task names:\n3\n1\n\n\nRPC: Barrier"
    error = distributed.lost(jax.errors.JaxRuntimeError(barrier))
    assert str(error) == "process 1, 3 is gone (DEADLINE_EXCEEDED: Barrier timed out. Id: b::0.)"
    assert distributed.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None
    assert distributed.lost(CheckpointError("not saved (UNAVAILABLE)")) is None
    error = LostError("late")
    assert distributed.lost(error) is error


PROGRAM = """
import os, sys, threading, time
from fot import distributed
from fot.errors import LostError, UserError

number, told = int(os.environ["JAX_PROCESS_ID"]), threading.Event()
time.sleep(float(sys.argv[1]) if number == int(sys.argv[2]) else 0)


def main():
    with distributed.joined(), distributed.told('news', told.set):
        assert not distributed.is_first() == bool(number)
        {body}
    print("over")


main()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ran(
    body: str, numbers=(0, 1), count: int = 2, join: int = 120, late: float = 0, who: int = 0
) -> list[tuple[int, str, str]]:
    """Returns exit code, output and errors of the processes `numbers`, of `count`, that run the body.

    They wait `join` seconds for each other; the process `who` begins `late` seconds after the others.
    """
    address = f"127.0.0.1:{free_port()}"
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
    shared |= {"FOT_JOIN_SECONDS": str(join), "JAX_NUM_PROCESSES": str(count), "JAX_NUM_CPU_DEVICES": "3"}
    program = PROGRAM.format(body=body.replace("\n", "\n        "))
    command = [sys.executable, "-c", program, str(late), str(who)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, env=shared | {"JAX_PROCESS_ID": str(number)}, **pipes) for number in numbers]
    ended = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=300)
            ended.append((process.returncode, out, errors))
    finally:
        for process in processes:
            process.kill()
    return ended


def test_they_agree_and_tell_each_other():
    body = (
        "print(distributed.agree('step', 3 + number, 60))\n"
        "if number:\n    distributed.tell_all('news')\nassert told.wait(60)"
    )
    for code, out, errors in ran(body):
        assert (code, out) == (0, "4\nover\n"), errors


def test_who_does_not_come_to_a_barrier_is_named():
    wait = "distributed._state().client.wait_at_barrier('saved', 1000)"
    (code, _, errors), _ = ran(f"time.sleep(6) if number else {wait}")
    assert code == 42 and errors.startswith("error: process 1 is gone (DEADLINE_EXCEEDED: Barrier timed out."), errors


def test_one_that_leaves_barriers_out_is_named_and_nobody_waits_for_it():
    body = (
        "both = distributed.Barriers('both')\nboth(key='begin', timeout_ms=60_000)\n"
        "for key in ('failed',) if number else ('written', 'renamed'):\n"
        "    try:\n        both(key=key, timeout_ms=60_000)\n"
        "    except LostError as error:\n        print(error, both.failed)\n"
        "distributed.agree('end', 1, 60)"
    )
    first, second = ran(body)
    assert first[:2] == (0, "process 1 has failed in its part True\n" * 2 + "over\n"), first
    assert second[:2] == (0, "process 0 has failed in its part True\nover\n"), second


def test_sigterm_to_one_ends_all():
    body = (
        "import os, signal\nfrom fot.termination import Termination\nwith Termination():\n"
        "    number and os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)"
    )
    for code, _, errors in ran(body):
        assert (code, errors) == (42, "terminated: there was nothing to save; the same command starts again\n")


def test_a_step_that_one_has_begun_is_finished_by_all():
    # The first waits for the second inside its step, while the second is terminated before it begins its own.
    body = (
        "import signal\nfrom fot.termination import Termination\n"
        "client, step, begun = distributed._state().client, 0, 0\n"
        "def rescue():\n"
        "    last = distributed.agree('last', begun)\n"
        "    with termination.halted(lambda: step >= last, 60) as there: return f'step {step} of {last}, {there}'\n"
        "with Termination() as termination, termination.rescue(rescue):\n"
        "    for n in (1, 2):\n"
        "        if number and n == 2:\n"
        "            client.blocking_key_value_get('begun', 60_000)\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            time.sleep(1)\n"
        "        begun = n\n"
        "        with termination.deferred():\n"
        "            if n == 2 and not number: client.key_value_set('begun', '2')\n"
        "            client.wait_at_barrier(f'step {n}', 60_000)\n"
        "            step = n\n"
        "    time.sleep(60)"
    )
    for code, _, errors in ran(body):
        assert (code, errors) == (42, "terminated: step 2 of 2, True\n")


PREEMPTION = """
import os, pathlib, signal, sys, time, jax
from jax.experimental.multihost_utils import reached_preemption_sync_point as reached

sys.argv[2] == "off" and jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(sys.argv[1], 1, 0)
[caught] = [line.split()[1] for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "SigCgt" in line]
print(int(caught, 16) >> (signal.SIGTERM - 1) & 1, flush=True)
assert not reached(0)
os.kill(os.getpid(), signal.SIGTERM)
deadline, step = time.monotonic() + 60, 1
while not reached(step):
    assert time.monotonic() < deadline
    time.sleep(0.01)
    step += 1
print("reached", flush=True)
"""


def test_the_notice_of_jax_is_sigterm_and_without_its_service_sigterm_is_left_to_others():
    # What the head of fot/termination.py says of JAX: if it changes, so has that to.
    runs = {}
    for service in ("on", "off"):
        command = [sys.executable, "-c", PREEMPTION, f"127.0.0.1:{free_port()}", service]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        runs[service] = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert (runs["on"].returncode, runs["on"].stdout) == (0, "1\nreached\n"), runs["on"].stderr
    assert runs["off"].stdout == "0\n" and "Preemption sync manager has not been initialized" in runs["off"].stderr


def test_who_gives_no_word_is_named_and_a_failure_ends_its_process_at_once():
    # The second waits, as in a computation that needs the first.
    first, second = ran("time.sleep(300) if number else distributed.agree('step', 1, 2)")
    assert first[0] == 42 and first[2].startswith("error: no word within 2 s from process 1 of 2\n"), first
    assert second[0] == -6, "JAX ends a process that has lost the first"
    failed, _ = ran("if number: time.sleep(300)\nraise UserError('no space')")
    assert failed == (2, "", "error: no space\n")


def test_who_holds_the_others_up_is_named_by_all_when_one_gives_up():
    # All but the first hear of it; the last has no word for them.
    body = (
        "distributed.AGREE, place = 3, f'fot/rows.py, line {number}'\n"
        "give_up = lambda: distributed.give_up('stuck', 10 - number, place) if number < 2 else time.sleep(300)\n"
        "with distributed.told(distributed.STUCK, give_up):\n"
        "    number or distributed.give_up('stuck', 10, place)\n    time.sleep(300)"
    )
    line = (
        "error: stuck: process {}1 is at step 9 in fot/rows.py, line 1; process 0 is at step 10 in fot/rows.py, line 0;"
    )
    for code, _, errors in ran(body):
        assert code == 42 and errors.startswith(line.format("")), errors
    first, second, third = ran(body, (0, 1, 2), 3)
    for code, _, errors in (first, second):
        assert code == 42 and errors.startswith(line.format("2 has no word within 3 s; process ")), errors
    assert third[0] == -6, "JAX ends a process that has lost the first"


def test_positions_of_many_processes_are_in_one_line():
    words = {number: "is at step 9 in a, line 1" for number in range(64)}
    assert distributed._positions(words, 64) == ["process 0, 1, 2, 3 and 60 more is at step 9 in a, line 1"]
    words |= {3: "is at step 10 in b, line 2", 7: "is at step 9 in b, line 2"}
    assert distributed._positions(words, 66) == [
        "process 64, 65 has no word within 15 s",
        "process 7 is at step 9 in b, line 2",
        "process 0, 1, 2, 4 and 58 more is at step 9 in a, line 1",
        "process 3 is at step 10 in b, line 2",
    ]
    scattered = {number: f"is at step {number} in a, line 1" for number in range(64)}
    assert len(distributed._positions(scattered, 64)) == distributed.SHOWN


@pytest.mark.parametrize(
    ("numbers", "count", "missing"),
    [((0,), 2, "1"), ((1,), 2, "0"), ((0, 2), 4, "1, 3")],
    ids=["second", "first", "two"],
)
def test_those_that_never_come_are_named_by_all_that_do(numbers, count, missing):
    for number, (code, out, errors) in zip(numbers, ran("pass", numbers, count, join=3), strict=True):
        assert (code, out) == (42, ""), errors
        [line] = [line for line in errors.splitlines() if line.startswith("error:")]
        assert line.startswith(f"error: process {number} of {count}: process {missing} did not come to 127.0.0.1:")
        assert "within 3 s" in line and "FOT_JOIN_SECONDS" in line


@pytest.mark.parametrize("who", [0, 1])
def test_one_that_comes_late_is_waited_for(who):
    for code, out, errors in ran("print(distributed.agree('step', number, 60))", late=1.5, who=who):
        assert (code, out) == (0, "1\nover\n"), errors


@pytest.mark.parametrize("text", ["0", "soon", "1.5"])
def test_seconds_to_join_that_make_no_sense(text):
    assert distributed.join_seconds({}) == distributed.JOIN
    with pytest.raises(UserError, match=f"FOT_JOIN_SECONDS={text} must be a whole number"):
        distributed.join_seconds({"FOT_JOIN_SECONDS": text})


ROWS = """
import types
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from fot.batch import Batch
from fot.data import loader
first, second = ([device for device in jax.devices() if device.process_index == each] for each in (0, 1))
for order in ({order}):
    place = NamedSharding(Mesh(np.array(order), ("data", "tensor")), PartitionSpec("data"))
    config = types.SimpleNamespace(data=types.SimpleNamespace(batch_size=len(order), context=4))
    mine = loader.host_rows(config, place)
    own = Batch(*(np.array(mine)[:, None] + np.zeros((1, 4), int) for _ in Batch._fields))
    for field in loader.global_batch(own, place, len(order)):
        assert field.shape == (len(order), 4)
        for shard in field.addressable_shards:
            assert (np.asarray(shard.data) == np.arange(len(order))[shard.index[0], None]).all()
    print(mine)
"""


def test_a_process_has_the_rows_of_its_devices_wherever_a_mesh_has_put_them():
    apart = "[[first[0]], [second[0]], [second[1]], [first[1]]]"
    shared = "[[first[0], first[1]], [first[2], second[0]], [second[1], second[2]]]"
    (left, right) = ran(ROWS.replace("{order}", f"{apart}, {shared}").strip())
    assert left[:2] == (0, "[0, 3]\n[0, 1]\nover\n"), left
    assert right[:2] == (0, "[1, 2]\n[1, 2]\nover\n"), right
