"""SIGTERM ends a process with 42 wherever its main thread is, saves what there is, and never looks at half a change."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from fot import cli
from fot.termination import Termination

ROOT = pathlib.Path(__file__).parent.parent

PROGRAM = """
import hashlib, pathlib, sys, time
from fot.errors import UserError
from fot.termination import Termination

saved, done = pathlib.Path(sys.argv[1]), [0, 0]


def busy():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as a compilation: no bytecode of this thread for minutes


def ready():
    print("ready", flush=True)


def save():
    with termination.halted() as there:
        assert there
        ready()
        time.sleep(0.3)
        saved.write_text(str(done))
    return "saved"


def further():
    with termination.halted(lambda: done[1] >= 5, 60) as there:
        assert there
        saved.write_text(str(done))
    return "saved"


def stuck():
    with termination.halted(lambda: False, 0.2) as there:
        return str(there)


def at_once():
    saved.write_text("at once")
    return "saved"


def fail():
    raise UserError("no space")


with Termination() as termination:
{body}
"""

BODIES = {
    "nothing to save": "ready(); busy()",
    "after the rescue": "with termination.rescue(save): pass\n    ready(); busy()",
    "busy": "with termination.rescue(save):\n        done[:] = 1, 1\n        ready(); busy()",
    "deferred": (
        "with termination.rescue(save):\n"
        "        while True:\n"
        "            with termination.deferred():\n"
        "                done[0] += 1; ready(); time.sleep(0.05); done[1] += 1"
    ),
    "told inside": "with termination.rescue(at_once), termination.deferred():\n        ready(); busy()",
    "leaving": (
        "with termination.rescue(save):\n"
        "        done[:] = 1, 1\n"
        "        ready()\n"
        "        while not termination._requested.is_set(): time.sleep(0.01)\n"
        "    saved.write_text('left')"
    ),
    "behind": (
        "with termination.rescue(further):\n"
        "        while True:\n"
        "            with termination.deferred():\n"
        "                done[0] += 1; done[1] += 1; done[1] < 2 and ready(); done[1] == 2 and time.sleep(1)"
    ),
    "too far behind": "with termination.rescue(stuck):\n        ready(); busy()",
    "failing": "with termination.rescue(fail):\n        ready(); busy()",
    "broken": "with termination.rescue(lambda: 1 / 0):\n        ready(); busy()",
}


def terminated(tmp_path, body: str, times: int = 1) -> tuple[int, str, str]:
    """Returns exit code, what was saved, and stderr of the program after SIGTERM."""
    command = [sys.executable, "-c", PROGRAM.format(body="    " + BODIES[body]), str(tmp_path / "saved")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        for _ in range(times):
            process.terminate()
            time.sleep(0.1)
        errors = process.communicate()[1]
    saved = tmp_path / "saved"
    return process.returncode, saved.read_text() if saved.exists() else "", errors


@pytest.mark.parametrize("body", ["nothing to save", "after the rescue"])
def test_with_nothing_to_save_it_exits_at_once(tmp_path, body):
    code, saved, errors = terminated(tmp_path, body)
    assert (code, saved) == (cli.RETRY, "") and len(errors.splitlines()) == 1


@pytest.mark.parametrize("times", [1, 3])  # the further ones come during the save
def test_it_saves_while_the_main_thread_is_in_a_library(tmp_path, times):
    assert terminated(tmp_path, "busy", times) == (cli.RETRY, "[1, 1]", "terminated: saved\n")


def test_it_waits_for_a_change_to_be_whole(tmp_path):
    code, saved, _ = terminated(tmp_path, "deferred")
    first, second = eval(saved)
    assert code == cli.RETRY and first == second > 0


def test_what_needs_no_whole_change_is_done_at_once(tmp_path):
    assert terminated(tmp_path, "told inside") == (cli.RETRY, "at once", "terminated: saved\n")


def test_a_block_is_left_before_sigterm_or_not_at_all(tmp_path):
    assert terminated(tmp_path, "leaving") == (cli.RETRY, "[1, 1]", "terminated: saved\n")


def test_it_goes_on_to_where_another_process_is_and_no_further(tmp_path):
    assert terminated(tmp_path, "behind") == (cli.RETRY, "[5, 5]", "terminated: saved\n")


def test_it_does_not_wait_for_ever_to_be_there(tmp_path):
    assert terminated(tmp_path, "too far behind") == (cli.RETRY, "", "terminated: False\n")


def test_a_save_that_fails_is_an_error(tmp_path):
    assert terminated(tmp_path, "failing") == (cli.USER_ERROR, "", "error: no space\n")
    code, _, errors = terminated(tmp_path, "broken")
    assert code == 1 and "ZeroDivisionError" in errors


def test_signals_are_as_before_after_the_block_and_untouched_without_one():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination, termination.rescue(lambda: ""):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
    with Termination().rescue(lambda: ""):
        assert signal.getsignal(signal.SIGTERM) == before
