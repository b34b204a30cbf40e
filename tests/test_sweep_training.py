"""A sweep of real training: 12 short trials of dictionary lookup, 2 at a time, killed three times."""

import pathlib
import random
import re
import subprocess
import sys
import time

import pytest

from fot import cli
from fot import config as config_lib
from launch import sweep
from launch.trials import Trials
from tests.sweeping import ROOT


def command(*words: str, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "launch.sweep", *words], cwd=ROOT, text=True, **how)


@pytest.mark.slow
def test_twelve_trials_through_three_kills(tmp_path):
    given = ["--sweep=configs/sweeps/dictionary_tiny.py", f"--workdir={tmp_path}", "--parallel=2"]
    draw, kills, output = random.Random(0), 3, tmp_path / "output.txt"
    with open(output, "a") as file:
        for number in range(kills):
            with command(*given, stdout=file, stderr=file) as process:
                while output.read_text().count(" complete, ") < 3 * number:  # all over the sweep
                    assert process.poll() is None, output.read_text()
                    time.sleep(0.1)
                time.sleep(draw.uniform(2, 12))
                assert process.poll() is None, "it was over before it was killed"
                process.kill()
        with command(*given, stdout=file, stderr=file) as process:
            try:
                assert process.wait(1800) == 0, output.read_text()
            finally:
                process.kill()
    shown = output.read_text()
    print(shown)
    assert "12 trials: 12 complete, 0 pruned, 0 failed" in shown and " started, again" in shown
    found = Trials.read(sweep._kept(tmp_path)["study"], tmp_path, "")
    assert {trial.state for trial in found} == {"COMPLETE"} and len({trial.id for trial in found}) == 12
    for trial in found:
        folder = tmp_path / "trials" / trial.id
        assert list(trial.curve) == [10, 20, 30, 40], "each step once"
        trained = re.findall(r"trained 40 steps", (folder / "trial.log").read_text())
        assert len(trained) == 1, "none came to its end twice"
    with command("report", f"--workdir={tmp_path}", stdout=subprocess.PIPE) as process:
        table = process.communicate()[0]
    print(table)
    assert process.returncode == 0 and all(trial.id in table for trial in found)
    best = min(found, key=lambda trial: trial.value)
    config = config_lib.from_dict(cli.load_file(str(tmp_path / "report" / "best.py")))
    assert repr(config.optimizer.learning_rate) == best.overrides["optimizer.learning_rate"]
    assert config.train.steps == 40
    pictures = {path.name for path in pathlib.Path(tmp_path / "report").glob("*.png")}
    assert pictures == {"parameters.png", "coordinates.png"}
