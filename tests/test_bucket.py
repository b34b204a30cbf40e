"""Objects written whole, one line for what goes wrong, and a folder of a bucket that one run holds; on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from fot import bucket, cli, files, lease, train, trained, workdir
from fot.config import ExperimentConfig
from fot.errors import UserError
from fot.lease import Lease
from tests import fake_gcs

FOLDER = "gs://here/runs/x"
LOCK = f"{FOLDER}/{files.LOCK}"


@pytest.fixture(scope="module")
def server():
    with fake_gcs.connected() as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server, monkeypatch):
    server.objects.clear()
    monkeypatch.setattr(lease, "LOOK", 0.01)


def test_objects_are_whole_and_name_what_they_replace(server):
    assert bucket.read(f"{FOLDER}/a") is None
    first = bucket.write(f"{FOLDER}/a", b"1", over=0)
    assert bucket.read(f"{FOLDER}/a") == (b"1", first)
    assert bucket.write(f"{FOLDER}/a", b"2", over=0) is None
    second = bucket.write(f"{FOLDER}/a", b"2", over=first)
    assert second != first and bucket.write(f"{FOLDER}/a", b"3", over=first) is None
    assert bucket.write(f"{FOLDER}/a", b"3") and bucket.read(f"{FOLDER}/a").data == b"3"
    bucket.delete(f"{FOLDER}/a", over=second)  # is of another generation by now
    assert server.names("here") == ["runs/x/a"]
    bucket.delete(f"{FOLDER}/a", bucket.read(f"{FOLDER}/a").generation)
    bucket.delete(f"{FOLDER}/a", 1)
    assert server.names("here") == []


def test_a_write_whose_answer_is_lost_knows_its_own_work(server):
    bucket.read(f"{FOLDER}/a")
    server.losing = 1
    generation = bucket.write(f"{FOLDER}/a", b"mine", over=0)
    assert server.losing == 0 and bucket.read(f"{FOLDER}/a") == (b"mine", generation)


def test_paths_in_buckets_have_the_methods_of_others(server):
    path = bucket.path(FOLDER) / "a" / "b.txt"
    files.write(path, lambda file: file.write(b"text"), "")
    assert str(path) == f"{FOLDER}/a/b.txt" and path.is_file() and path.read_bytes() == b"text"
    assert bucket.absolute(path) == path.expanduser() == path and not (path.parent / "c").is_file()
    assert not bucket.is_bucket("runs/x") and str(bucket.path("runs/x")) == "runs/x"
    with pytest.raises(UserError, match="--target=gs://here/x is in a bucket: name a folder of this machine"):
        bucket.folder("target", "gs://here/x")


def without_credentials(monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))


def without_package(monkeypatch, _):
    monkeypatch.setattr(bucket, "PACKAGES", ("gcsfs", "google.no_such_package"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("none-such", None, "no bucket gs://none-such: gcloud storage buckets create gs://none-such --location"),
        (
            "closed-one",
            None,
            "no permission .*storage.buckets.get.*needs the roles storage.objectUser and storage.leg",
        ),
        ("here-too", without_credentials, "no credentials .*: gcloud auth application-default login"),
        ("here-too", without_package, "needs the package google.no_such_package: pip install .*gcs"),
    ],
)
def test_what_is_missing_is_one_line(server, name, change, message, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    if change:
        change(monkeypatch, tmp_path)
    url = f"gs://{name}/run"
    for call in (
        lambda: train.main(ExperimentConfig(), train.Flags(workdir=url)),
        lambda: trained.load_config(url),
        lambda: trained.inherit({"train": {"init_from": url}}),
    ):
        assert cli.exit_code(call) == cli.USER_ERROR
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"error: {url}"), said
        assert re.search(message, said), said
    assert os.listdir(tmp_path) == [] and server.names(name) == []


def held(**changes) -> Lease:
    one = Lease(FOLDER, changes.get("log", print))
    one.acquire()
    return one


def owner(**changes) -> bytes:
    return json.dumps({**lease._this()._asdict(), **changes}).encode()


def test_a_folder_is_held_by_one(server):
    one = held()
    with pytest.raises(UserError, match=rf"{FOLDER} is in use by process {os.getpid()} on host .*: stop that one"):
        held()
    one.renew()
    one.release()
    assert server.names("here") == []
    held().release()


def test_of_many_that_come_at_once_one_gets_it(server):
    got, refused = [], []

    def come():
        try:
            got.append(held())
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_what_a_killed_process_of_this_machine_held_is_free_at_once(server):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = lease._began(child.pid)
    server.put("here", f"runs/x/{files.LOCK}", owner(number=child.pid, began=began, who="the child"))
    with pytest.raises(UserError, match="in use by the child"):
        held()
    child.kill()
    child.communicate()
    held()  # long before SILENCE


@pytest.mark.parametrize(
    "content", [owner(machine="another", who="a node"), b"not of this program"], ids=["a node", "another program"]
)
def test_who_is_silent_is_followed(server, monkeypatch, content):
    monkeypatch.setattr(lease, "SILENCE", 0.3)
    before, said = server.put("here", f"runs/x/{files.LOCK}", content), []
    began = time.monotonic()
    now = held(log=said.append)
    assert time.monotonic() - began >= 0.3 and bucket.read(LOCK).generation > before.generation
    who = "a node" if b"node" in content else "another program"
    assert said == [f"waiting for a sign of life, up to 0.3 s: {FOLDER} was in use by {who}"]
    now.renew()


def test_who_gives_a_sign_of_life_is_not_followed(server):
    content = owner(machine="another", who="a node")
    server.put("here", f"runs/x/{files.LOCK}", content)
    sign = threading.Timer(0.2, server.put, ("here", f"runs/x/{files.LOCK}", content))
    sign.start()
    with pytest.raises(UserError, match="in use by a node"):
        held(log=lambda line: None)
    sign.join()


def test_who_was_followed_saves_no_more(server):
    run = held()
    server.put("here", f"runs/x/{files.LOCK}", owner(machine="another", who="a node"))
    with pytest.raises(UserError, match="in use by a node: this one was silent for too long and saves no more"):
        run.renew()
    run.release()  # leaves what is another's
    assert server.names("here")


def test_small_files_are_copied_from_a_folder_of_this_machine(server, monkeypatch):
    before = server.put("here", "runs/x/hang.0.txt", b"before\n")
    with workdir.opened(FOLDER, print) as place:
        assert str(place.checkpoints) == f"{FOLDER}/checkpoints"
        place.sync()
        assert bucket.read(f"{FOLDER}/hang.0.txt").generation == before.generation, "what has not changed is not copied"
        with open(place.local / "hang.0.txt", "a") as file:
            file.write("now\n")
        files.write(place.local / "profile" / "a" / "trace", lambda file: file.write(b"x"), "")
        (place.local / "half.tmp").touch()
        place.sync()
        assert server.names("here") == [f"runs/x/{name}" for name in ("hang.0.txt", "profile/a/trace", files.LOCK)]
        assert bucket.read(f"{FOLDER}/hang.0.txt").data == b"before\nnow\n"
        (place.local / "metrics.jsonl").write_text("last\n")
    assert bucket.read(f"{FOLDER}/metrics.jsonl").data == b"last\n"
    assert not place.local.exists() and bucket.read(LOCK) is None
    place.sync()  # of a thread that comes too late
    assert bucket.read(LOCK) is None


def test_a_thread_copies_meanwhile_and_shows_that_the_run_lives(server, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    with workdir.opened(FOLDER, print) as place:
        first = bucket.read(LOCK)
        (place.local / "hang.0.txt").write_text("stacks")
        deadline = time.monotonic() + 30
        while bucket.read(f"{FOLDER}/hang.0.txt") is None or bucket.read(LOCK).generation <= first.generation + 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_bucket_that_closes_ends_the_run_in_one_line(server, monkeypatch):
    with pytest.raises(UserError) as error, workdir.opened(FOLDER, print) as place:
        monkeypatch.setattr(server, "closed", {"here"})
        place.sync()
    assert str(error.value).startswith(f"{LOCK}: no permission (someone@example.com does not have storage.buckets.get")
    assert "\n" not in str(error.value)


def test_a_lost_workdir_does_not_hide_what_ended_the_run(server):
    with pytest.raises(KeyError) as error, workdir.opened(FOLDER, print):
        server.put("here", f"runs/x/{files.LOCK}", owner(machine="another", who="a node"))
        raise KeyError("mine")
    assert "in use by a node" in error.value.__notes__[0]


# A run whose documents take long to load.
LOADING = """
import sys, time
from fot import train
from fot.config import ExperimentConfig
from fot.termination import Termination

def load(*_):
    print("loading", flush=True)
    time.sleep(60)

train.corpus.load = load
with Termination() as termination:
    train.train(ExperimentConfig(), sys.argv[1], print, termination)
"""


def test_sigterm_before_the_first_step_leaves_the_workdir_to_others_at_once(server):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", LOADING, FOLDER], **pipes) as process:
        assert process.stdout.readline() == "loading\n", process.communicate()
        assert f"runs/x/{files.LOCK}" in server.names("here")
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 42 and "nothing to save" in errors, errors
    assert f"runs/x/{files.LOCK}" not in server.names("here")


def test_a_hang_report_is_named_where_the_workdir_is(server):
    lines, told = [], threading.Event()

    def log(line):
        lines.append(line)
        told.set()

    with workdir.opened(FOLDER, print) as place, train._reports(place, ExperimentConfig(), 0, log, None) as reports:
        reports.watch._least = 0.0
        for _ in range(3):
            reports.watch.begin()
            reports.watch.end()
        reports.watch.begin()
        assert told.wait(60)
        assert lines[0].endswith(f"the stacks of all threads are in {FOLDER}/hang.0.txt")
        place.sync()
        assert bucket.read(f"{FOLDER}/hang.0.txt").data
