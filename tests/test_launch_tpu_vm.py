"""TPU machines by queued resources: every state, slow answers, errors, preemption; and nothing is left behind."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from fot.errors import UserError
from launch import queued, tpu_vm
from launch.job import RETRY
from launch.machines import Patience
from tests.launching import ZONE, FakeCloud, golden, job, repository

# Steps that are to succeed have time on a busy machine too; tests of time limits shorten them.
QUICK = Patience(poll=0.05, answer=60, copy=60, setup=60, settle=60, silence=60, delete=60)
READY = ["ACTIVE"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.chdir(repository(tmp_path / "source"))
    return FakeCloud(tmp_path, monkeypatch)


def submit(cloud: FakeCloud, keep: bool = False, patience: Patience = QUICK, **changes) -> int:
    changes = {"name": "job", "setup": "cat README", "python": cloud.python, "topology": "v4:2x2x1", **changes}
    return tpu_vm.submit(job(**{"slices": 1, **changes}), ZONE, keep, patience=patience)


def test_commands():
    golden("tpu_vm.txt", tpu_vm.plan(job(setup=tpu_vm.SETUP, python=tpu_vm.PYTHON), ZONE))


def test_commands_with_an_image():
    place = dataclasses.replace(ZONE, project="p", network="n", spot=False, reserved=True)
    one = job(slices=1, topology="v5e:2x4", image="us-docker.pkg.dev/project/fot/train:1", setup="echo 'a b'")
    golden("tpu_vm_image.txt", tpu_vm.plan(one, place))


@pytest.mark.parametrize(
    ("topology", "flags"),
    [
        ("v4:2x2x1", ["--accelerator-type=v4-8"]),
        ("v4:2x2x4", ["--accelerator-type=v4-32"]),
        ("v4:4x4x8", ["--accelerator-type=v4-256"]),
        ("v4:8x4x4", ["--type=v4", "--topology=8x4x4"]),
        ("v4:4x4x16", ["--type=v4", "--topology=4x4x16"]),
        ("v5e:1x1", ["--accelerator-type=v5litepod-1"]),
        ("v5e:8x16", ["--accelerator-type=v5litepod-128"]),
        ("v5p:8x8x8", ["--accelerator-type=v5p-1024"]),
        ("v6e:4x4", ["--accelerator-type=v6e-16"]),
    ],
)
def test_slices_by_name(topology, flags):
    assert queued.accelerator(job(topology=topology).slice) == flags


@pytest.mark.parametrize("codes", [("0",), ("3",), ("2",)])
def test_a_run_ends_with_its_exit_code(cloud, capfd, codes):
    cloud.plays(["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], train=codes)
    assert submit(cloud) == int(codes[0])
    assert cloud.verbs == ["create", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert cloud.left == []
    shown = capfd.readouterr().out
    for state in queued.WAITING:
        assert state in shown
    assert "machine0 starts 1: -m fot.train --config=configs/longllama_3b.py" in shown


def test_every_host_of_every_slice_trains(cloud, capfd):
    cloud.plays(READY, hosts=8, train=("0",))
    assert submit(cloud, topology="v4:2x2x4", slices=2) == 0
    assert len(list(cloud.train.parent.glob("train.machine*"))) == 8
    assert capfd.readouterr().out.count(" starts 1") == 1, "one log is shown"


def test_terminated_runs_start_again_on_the_same_machines(cloud, capfd):
    cloud.plays(READY, hosts=2, train=("42,42", "134,42", "42,137", "0,0"))
    assert submit(cloud, topology="v4:2x2x2") == 0
    assert cloud.verbs.count("create") == 1
    shown = capfd.readouterr().out
    assert [f" starts {number}" in shown for number in (1, 2, 3, 4)] == [True] * 4
    assert shown.count("starts 1:") == 1, "a log is followed from where it was left"


def test_one_process_that_fails_ends_the_job(cloud):
    cloud.plays(READY, hosts=2, train=("42,1",))
    assert submit(cloud, topology="v4:2x2x2") == 1
    assert cloud.left == []


def test_processes_that_hang_after_another_has_ended_are_killed(cloud):
    cloud.plays(READY, hosts=2, train=("42,stuck", "0,0"))
    assert submit(cloud, patience=dataclasses.replace(QUICK, settle=0.5), topology="v4:2x2x2") == 0


def test_retries_end(cloud):
    cloud.plays(READY, train=("42",) * 3)
    with pytest.raises(UserError, match="terminated 3 times: --retries=2 allows no further start"):
        submit(cloud, retries=2)
    assert cloud.left == []


@pytest.mark.parametrize(
    "states",
    [
        ["WAITING_FOR_RESOURCES", "SUSPENDING"],
        ["ACTIVE", "SUSPENDING", "SUSPENDED"],
        ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"],
        ["ACTIVE", "ACTIVE", "SUSPENDED"],
    ],
)
def test_preempted_machines_are_made_again(cloud, capfd, states):
    cloud.plays(states, READY, lingers=2, train=("wait", "0") if "ACTIVE" in states else ("0",))
    assert submit(cloud) == 0
    assert cloud.verbs.count("create") == 2
    assert cloud.left == []
    assert "the machines are made again" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (["ACCEPTED", "FAILED"], "the request failed: There is no more capacity in the zone"),
        (["ACCEPTED", "VANISHED"], "the machines are GONE: somebody has deleted them"),
        (["ACTIVE", "DELETING"], "the machines are DELETING: somebody has deleted them"),
    ],
)
def test_requests_that_lead_nowhere(cloud, states, message):
    cloud.plays(states, train=("wait",))
    with pytest.raises(UserError, match=message):
        submit(cloud)
    assert cloud.left == []


def test_quota(cloud):
    cloud.plays(READY, errors={"create": ["RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPreemptible' has been exceeded."]})
    with pytest.raises(UserError, match="queued-resources create.*: ERROR: .*Quota limit 'TPUV4sPreemptible' has been"):
        submit(cloud)
    assert cloud.left == []


@pytest.mark.parametrize("verb", ["scp", "ssh"])
def test_a_step_that_fails_ends_the_job_and_leaves_nothing(cloud, verb):
    cloud.plays(READY, errors={verb: ["Permission denied (publickey)."]})
    with pytest.raises(UserError, match="publickey"):
        submit(cloud)
    assert cloud.left == []


def test_a_setup_that_fails(cloud):
    cloud.plays(READY)
    with pytest.raises(UserError, match="queued-resources ssh: No such file|cat: nothing: No such file"):
        submit(cloud, setup="cat nothing")
    assert cloud.left == []


def test_a_service_that_does_not_answer_is_waited_for(cloud):
    cloud.plays(["ACCEPTED", "ACTIVE"], errors={"describe": ["", "", "503 unavailable", "", "503 unavailable"]})
    assert submit(cloud) == 0


def test_a_service_that_never_answers_is_an_error(cloud):
    cloud.plays(["ACCEPTED"], errors={"describe": ["", *["503 unavailable"] * 1000]})
    with pytest.raises(UserError, match="job may still be there, and cost .*: gcloud .* delete job --force"):
        submit(cloud, patience=dataclasses.replace(QUICK, silence=0.5, delete=0.5))
    assert "delete" in cloud.verbs


def test_slow_answers_are_cut_off(cloud):
    cloud.plays(READY, seconds={"create": 60})
    began = time.monotonic()
    with pytest.raises(UserError, match="create.*: no answer from gcloud compute .* in 4 seconds"):
        submit(cloud, patience=dataclasses.replace(QUICK, answer=4))
    assert time.monotonic() - began < 50
    assert cloud.left == []


def test_a_queue_that_is_too_long(cloud, monkeypatch):
    cloud.plays(["WAITING_FOR_RESOURCES"])
    monkeypatch.setattr("launch.machines.MINUTE", 0.005)
    with pytest.raises(UserError, match="WAITING_FOR_RESOURCES after 1 minutes: raise --wait_minutes"):
        submit(cloud)
    assert cloud.left == []


def test_broken_connections_are_made_again(cloud, capfd):
    # The first follower, and the first question how it ended.
    cloud.plays(READY, errors={"ssh": ["", "", "broken pipe", "broken pipe"]})
    assert submit(cloud) == 0
    assert capfd.readouterr().out.count("starts 1:") == 1


def test_machines_that_never_answer(cloud):
    cloud.plays(READY, train=("wait",), errors={"ssh": ["", "", *["broken pipe"] * 1000]})
    with pytest.raises(UserError, match="the machines have not answered for 0.5 seconds"):
        submit(cloud, patience=dataclasses.replace(QUICK, silence=0.5))
    assert cloud.left == []


def test_keep_leaves_the_machines(cloud, capfd):
    cloud.plays(READY)
    assert submit(cloud, keep=True) == 0
    assert set(cloud.left) == {"request", "machine0"}
    assert "kept: job costs until this: gcloud compute tpus queued-resources delete job" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"queued resource job exists \(ACTIVE\): delete it, or give another --name"):
        submit(cloud)
    assert set(cloud.left) == {"request", "machine0"}, "what another launch made stays"


def test_a_service_that_refuses_is_an_error_before_anything_is_made(cloud):
    cloud.plays(READY, errors={"describe": ["PERMISSION_DENIED: log in", "PERMISSION_DENIED: log in"]})
    with pytest.raises(UserError, match="queued-resources describe job: ERROR: .* PERMISSION_DENIED: log in"):
        submit(cloud)
    assert cloud.verbs == []


LAUNCH = """
import sys
from launch import tpu_vm
from fot import cli
from tests.test_launch_tpu_vm import QUICK, ZONE, job
one = job(name="job", setup="true", python=sys.argv[1], topology="v4:2x2x1", slices=1)
code = []
failed = cli.exit_code(lambda: code.append(tpu_vm.submit(one, ZONE, False, patience=QUICK)))
sys.exit(failed or code[0])
"""


def launched(cloud: FakeCloud, until: str) -> subprocess.Popen:
    """Starts a launch in a process of its own and waits until it has said something."""
    root = str(pathlib.Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, cloud.python],
        env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"it ended without {until!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("until", ["WAITING_FOR_RESOURCES", "starts 1"])
def test_signals_leave_nothing(cloud, number, until):
    cloud.plays(["WAITING_FOR_RESOURCES"] if until.isupper() else READY, train=("wait",), lingers=2)
    process = launched(cloud, until)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # impatience changes nothing
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert cloud.left == []


def test_stop_saves_and_ends_the_launch(cloud, capfd):
    cloud.plays(READY, train=("wait",))
    process = launched(cloud, "starts 1")
    one = job(name="job", python=cloud.python, topology="v4:2x2x1", slices=1)
    tpu_vm.status(one, ZONE)
    tpu_vm.logs(one, ZONE, False)
    tpu_vm.stop(one, ZONE)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == RETRY
    assert "saved" in rest and "stopped" in rest
    assert cloud.left == []
    shown = capfd.readouterr().out
    assert "job: ACTIVE\n1 of 1 processes: running\n" in shown
    assert "machine0 starts 1" in shown


def test_delete(cloud, capfd):
    cloud.plays(READY)
    submit(cloud, keep=True)
    one = job(name="job", python=cloud.python, topology="v4:2x2x1", slices=1)
    tpu_vm.status(one, ZONE)
    assert "1 of 1 processes: done" in capfd.readouterr().out
    tpu_vm.delete(one, ZONE)
    assert cloud.left == []
    tpu_vm.status(one, ZONE)
    assert "job: GONE" in capfd.readouterr().out


def test_the_machines_get_the_source_as_it_is(cloud):
    pathlib.Path("README").write_text("changed\n")
    pathlib.Path("new").write_text("new\n")
    pathlib.Path("ignored").write_text("ignored\n")
    cloud.plays(READY)
    assert submit(cloud, keep=True, setup="cat README new > seen") == 0
    folder = cloud.folder / "machine0" / "job"
    assert (folder / "seen").read_text() == "changed\nnew\n"
    assert not (folder / "ignored").exists()
    assert json.loads((cloud.folder / "calls").read_text().splitlines()[0])[3] == "describe"
