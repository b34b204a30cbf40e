"""Table, pictures and best config of a sweep."""

import pathlib

import matplotlib.image
import pytest

from fot import cli
from fot import config as config_lib
from launch import sweep, sweep_report
from launch.trials import Trial
from tests.sweeping import ROOT, started, sweep_file, words

RATE, LAYERS = "optimizer.learning_rate", "model.memory_layers"
KEPT = {
    "metric": "held_out/loss",
    "goal": "minimize",
    "base": "configs/dictionary_tiny.py",
    "fixed": {"train.steps": "7"},
}


def trial(number: int, state: str, value: float | None, rate: str, why: str = "") -> Trial:
    overrides = {RATE: rate, LAYERS: "(1, 2)" if number % 2 else "(3,)"}
    return Trial(number, f"id{number}", overrides, state, value, {2: 3.0, 4: value or 2.5}, why, {})


FOUND = [
    trial(0, "COMPLETE", 1.5, "0.001"),
    trial(1, "FAIL", None, "1.0", "exit code 1, see x/trial.log"),
    trial(2, "PRUNED", 0.5, "0.1"),
    trial(3, "COMPLETE", 1.25, "0.01"),
    trial(4, "RUNNING", None, "0.003"),
]


def test_table_has_the_best_first():
    lines = sweep_report.table(sweep_report.ranked(FOUND, "minimize"), "held_out/loss").splitlines()
    assert lines[0].split() == ["trial", "state", "held_out/loss", "step", RATE, LAYERS]
    assert [line.split()[0] for line in lines[1:6]] == ["id3", "id0", "id2", "id4", "id1"]
    assert lines[1].split() == ["id3", "complete", "1.25", "4", "0.01", "(1,", "2)"]
    assert lines[6:] == ["id1: exit code 1, see x/trial.log"]
    assert [each.id for each in sweep_report.ranked(FOUND, "maximize")][:2] == ["id0", "id3"]


def test_report_is_written_and_the_best_config_is_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = sweep_report.write(tmp_path, FOUND, KEPT)
    assert (tmp_path / "table.txt").read_text() in shown and "best.py" in shown
    assert "id3: held_out/loss 1.25" in (tmp_path / "best.py").read_text()
    base = config_lib.from_dict(cli.load_file(KEPT["base"]))
    monkeypatch.chdir(tmp_path)  # it needs nothing of the folder that the sweep was started in
    command = cli.parse([f"--config={tmp_path / 'best.py'}", "--workdir=x"], sweep.ReportFlags, "")
    changed = [line.partition(":")[0] for line in config_lib.differences(base, command.config)]
    assert sorted(changed) == [LAYERS, RATE, "train.steps"]
    assert command.config.model.memory_layers == (1, 2) and command.config.optimizer.learning_rate == 0.01
    for name in ("parameters.png", "coordinates.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.02, "a picture with something on it"


def test_a_sweep_without_a_complete_trial_has_a_table_alone(tmp_path):
    shown = sweep_report.write(tmp_path, FOUND[1:3], KEPT)
    assert shown.endswith("no trial is complete yet\n")
    assert [path.name for path in tmp_path.iterdir()] == ["table.txt"]


@pytest.mark.parametrize("texts", [("0.1", "0.2"), ("3", "3"), ("a", "0.5"), ("true", "false"), ("0", "1000")])
def test_pictures_take_any_values(tmp_path, texts):
    found = [Trial(n, f"id{n}", {"x": text}, "COMPLETE", float(n), {}, "", {}) for n, text in enumerate(texts)]
    scale = sweep_report._Scale("x", found)
    assert all(0 <= scale.height(each) <= 1 for each in found)
    for draw in (sweep_report.parameters, sweep_report.coordinates):
        draw(found, "m", tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    given = words(tmp_path, sweep_file(tmp_path, f"Grid({{'{RATE}': (1e-1, 1e-2)}})"))
    with started(given, 0.01) as process:
        process.communicate(timeout=60)
    with pytest.raises(SystemExit) as end:
        sweep.main(["report", f"--workdir={tmp_path / 'run'}"])
    shown = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and shown[1].split()[1:] == ["complete", "0.2", "5", "0.01"]
    assert pathlib.Path(tmp_path / "run" / "report" / "best.py").exists()
    with pytest.raises(SystemExit) as end:
        sweep.main(["report", f"--workdir={tmp_path / 'none'}"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "no sweep was started in this --workdir" in error and error.count("\n") == 1


def test_labels_do_not_lie_on_each_other():
    texts = ("0.004492", "0.004476", "0.00443", "0.002", "0.0018")
    found = [Trial(n, f"id{n}", {"x": text}, "COMPLETE", float(n), {}, "", {}) for n, text in enumerate(texts)]
    assert sweep_report._Scale("x", found).labels == ["0.0018", "0.002", "0.00443"]
