"""Each step once after a resume, valid JSON, and progress without carriage returns where there is no terminal."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from fot import metrics
from fot.errors import UserError
from fot.metrics import MetricsWriter, Progress, read_metrics


def write_steps(workdir, steps, resumed_at):
    with MetricsWriter(workdir, resumed_at) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step})


def test_values_come_back_whatever_their_type(tmp_path):
    with MetricsWriter(tmp_path / "run", 0) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "tokens": np.int64(7), "rate": 0.25, "bf16": jnp.bfloat16(2)})
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "tokens": 7, "rate": 0.25, "bf16": 2.0}
    ]


def test_a_line_is_on_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, range(1, 9), 0)
    write_steps(tmp_path, range(6, 11), 5)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_new_run_in_an_old_workdir_starts_from_nothing(tmp_path):
    write_steps(tmp_path, range(1, 9), 0)
    write_steps(tmp_path, [1], 0)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_line_cut_off_by_a_kill_is_left_out_and_not_glued_to_the_next(tmp_path):
    write_steps(tmp_path, [1, 2], 0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write_steps(tmp_path, [3], 2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_non_finite_values_are_valid_json_also_after_a_resume(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": math.nan, "norm": math.inf})
    write_steps(tmp_path, [2], 1)

    def refuse(constant):
        raise AssertionError(constant)

    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first, parse_constant=refuse) == {"step": 1, "loss": None, "norm": None}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])


def test_tensorboard_has_an_event_file_for_each_start_even_in_one_second(tmp_path):
    write_steps(tmp_path, [1, 2], 0)
    write_steps(tmp_path, [2, 3], 1)
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"loss": 1}', "3"])
def test_damaged_line_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + bad + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_lines_come_now_and_then_and_at_the_end(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 20.0, 21.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(100, 0, stream) as progress:
        for step in (10, 20, 50, 100):
            progress.update(step, 2.5, 12345.0)
    lines = stream.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 10/100", "step 50/100", "step 100/100"]
    assert lines[1] == "step 50/100: loss 2.5000, 12,345 tokens/s, 00:20 left"
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_there_is_a_bar_that_counts_from_the_resumed_step():
    stream = Terminal()
    with Progress(100, 40, stream) as progress:
        progress.update(100, 2.5, 12345.0)
    last = stream.getvalue().split("\r")[-1]
    assert "100/100" in last and "loss 2.5000, 12,345 tokens/s" in last
