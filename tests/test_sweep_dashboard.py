"""optuna-dashboard on a sweep's storage, as a browser shows it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from launch import points
from launch.storage import JOURNAL
from launch.trials import Trials
from tests.sweeping import ROOT, sweep_file

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GRID = "Grid({'optimizer.learning_rate': (1e-1, 1e-2)})"


@pytest.fixture
def dashboard(tmp_path, monkeypatch):
    """The address of a dashboard on a sweep of two complete trials."""
    monkeypatch.chdir(ROOT)
    with Trials(points.load(str(sweep_file(tmp_path, GRID))), {}, "tried-study", tmp_path, "") as opened:
        for value in (0.75, 0.5):
            opened.finish(opened.claim(()), "COMPLETE", value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "optuna-dashboard"
    command = [program, tmp_path / JOURNAL, f"--port={port}", "--server=wsgiref", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_dashboard_has_the_sweep(dashboard, tmp_path):
    with urllib.request.urlopen(f"{dashboard}/api/studies") as answer:
        assert b"tried-study" in answer.read()
    with urllib.request.urlopen(f"{dashboard}/api/studies/0?after=0") as answer:
        trials = json.load(answer)["trials"]
    assert [(trial["state"], trial["values"], trial["params"][0]["name"]) for trial in trials] == [
        ("Complete", [0.75], "optimizer.learning_rate"),
        ("Complete", [0.5], "optimizer.learning_rate"),
    ]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_shows_the_sweep(dashboard, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    options += ["--virtual-time-budget=20000", "--dump-dom", f"{dashboard}/dashboard/"]
    home = {**os.environ, "HOME": str(tmp_path)}
    page = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120, env=home).stdout
    assert "tried-study" in page, page[-2000:]
