"""`benchmarks/saving.py` terminates a process that saves, and finds a whole checkpoint whether that was cut or not."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fot import cli

ROOT = pathlib.Path(__file__).parent.parent
KEYS = {"case", "config", "hosts", "arrays", "bytes", "seconds", "exit_code", "newest", "whole"}


@pytest.mark.slow
def test_a_save_that_is_cut_leaves_the_last_one_whole(tmp_path):
    command = [sys.executable, "-m", "benchmarks.saving", "--quick", f"--directory={tmp_path}"]
    variables = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    terminated, cut, bar = map(json.loads, done.stdout.splitlines())
    assert set(terminated) == set(cut) == KEYS and terminated["whole"] and cut["whole"]
    assert (terminated["exit_code"], terminated["newest"]) == (cli.RETRY, 2) and cut["newest"] in (1, 2)
    assert bar["met"] is None and bar["value"] == terminated["seconds"] > 0 and not list(tmp_path.iterdir())
