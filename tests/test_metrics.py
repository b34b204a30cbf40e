"""Each step once after a resume, valid JSON, and progress without carriage returns where there is no terminal."""

import io
import json
import math
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

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


def test_what_is_written_of_a_step_in_two_calls_is_one_line_and_a_resume_knows_it(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        assert writer.resumed == {}
        writer.write(1, {"loss": 1.0})
        writer.write(1, {"held_out/loss": 2.0})
        writer.write(2, {"loss": 3.0})
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 1, "loss": 1.0, "held_out/loss": 2.0}
    with MetricsWriter(tmp_path, 1) as writer:
        assert writer.resumed == {"step": 1, "loss": 1.0, "held_out/loss": 2.0}


def test_tensorboard_reads_every_step_and_the_one_resumed_at(tmp_path):
    write_steps(tmp_path, [1, 2, 3], 0)
    write_steps(tmp_path, [2], 1)
    first, second = (list(TFRecords(path)) for path in sorted((tmp_path / "tensorboard").iterdir(), key=board_of))
    assert [event.step for event in first if event.HasField("summary")] == [1, 2, 3]
    assert [event.step for event in second if event.HasField("session_log")] == [2]
    (value,) = second[-1].summary.value
    assert (value.tag, value.simple_value) == ("loss", 0.5)


def test_leftovers_of_a_killed_resume_are_swept_out(tmp_path):
    (tmp_path / "metrics.jsonl.abc.tmp").write_text("")
    write_steps(tmp_path, [1], 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_full_disk_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="can't write the metrics to .*free disk space") as error, writer:
            for step in range(1000):
                writer.write(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) < 1000


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def board_of(path) -> str:
    """The step that a file of TensorBoard was resumed at, the end of its name."""
    return path.name.rsplit(".", 1)[1]


class TFRecords:
    """Reads the events of a file of TensorBoard: length, its checksum, the event, its checksum."""

    def __init__(self, path):
        self._data = path.read_bytes()

    def __iter__(self):
        while self._data:
            (length,) = struct.unpack("Q", self._data[:8])
            yield Event.FromString(self._data[12 : 12 + length])
            self._data = self._data[16 + length :]


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
