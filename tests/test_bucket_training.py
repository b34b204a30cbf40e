"""Training in a bucket: killed, gone on with, evaluated and exported, as in a folder; real processes, real orbax."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fot import checkpoint, cli, files, generate, metrics, train, train_step, trained
from fot.convert import __main__ as conversion
from fot.errors import CheckpointError, UserError
from fot.evaluate import perplexity
from tests import fake_gcs
from tests.trainings import CACHED, timeless, write_documents

ROOT = pathlib.Path(__file__).parent.parent
BUCKET, SAVE_EVERY, STEPS = "runs", 3, 12

CONFIG = """
from configs import base


def get_config():
    config = base.get_config()
    config.model.layers, config.model.memory_layers, config.model.attention_block = 2, (1,), 16
    config.model.mlp, config.model.qk_norm = "swiglu", False
    config.model.dim, config.model.head_dim, config.model.mlp_dim, config.model.vocab_size = 32, 8, 64, 300
    config.crossbatch.d, config.crossbatch.d_schedule = (2,), "constant"
    config.data.task, config.data.files, config.data.cache_dir = ("files",), ({files!r},), {cache!r}
    config.data.tokenizer, config.data.context, config.data.min_document_tokens = "trained", 16, (32,)
    config.data.held_out_fraction = 0.3
    config.train.steps, config.train.log_every = {steps}, 1
    config.train.evaluate_every, config.train.evaluate_batches = 4, 1
    config.train.checkpoint_every, config.train.keep_last = {save_every}, 2
    config.evaluate.memory, config.evaluate.readers, config.evaluate.modes = (0, 16), ("dense",), ("single_doc",)
    config.evaluate.max_documents, config.evaluate.max_tokens, config.evaluate.block = 2, 64, 16
    return config
"""


class Place(NamedTuple):
    """What the runs of these tests share."""

    folder: pathlib.Path
    server: fake_gcs.Server

    def flags(self, workdir: str, *more: str) -> list[str]:
        return [f"--config={self.folder / 'run.py'}", f"--workdir={workdir}", *more]

    def start(self, workdir: str, *more: str, **environment: str) -> subprocess.Popen:
        """Starts a training; its output is that of the process."""
        command = [sys.executable, "-m", "fot.train", *self.flags(workdir, *more)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        shared = {**os.environ, **CACHED, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, cwd=ROOT, env={**shared, **environment}, **pipes)

    def train(self, workdir: str | pathlib.Path, *more: str) -> list[str]:
        """Trains here, and returns what it says."""
        said: list[str] = []
        train.train(cli.parse(self.flags(str(workdir), *more), train.Flags, "").config, workdir, said.append)
        return said

    def names(self, run: str) -> list[str]:
        return [name.removeprefix(f"{run}/") for name in self.server.names(BUCKET, f"{run}/")]

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """Returns what the metrics of a run in the bucket, or in a folder, say, but for what a clock says."""
        path = self.folder / run / metrics.FILE
        if not path.exists():
            path = self.folder / "metrics.jsonl"
            path.write_bytes(self.server.objects[BUCKET, f"{run}/{metrics.FILE}"].content)
        return timeless(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Documents, a config, and a server; the processes here have one device, as those that are started."""
    folder = tmp_path_factory.mktemp("bucket")
    documents, cache = write_documents(folder / "documents"), str(folder / "cache")
    (folder / "run.py").write_text(CONFIG.format(files=documents, cache=cache, steps=STEPS, save_every=SAVE_EVERY))
    one = jax.devices()[:1]
    with fake_gcs.connected() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one)
        yield Place(folder, server)


@pytest.fixture(scope="module")
def whole(place) -> pathlib.Path:
    """The workdir, a folder, of a run that nothing happened to."""
    place.train(place.folder / "whole")
    return place.folder / "whole"


def last(workdir: str | pathlib.Path) -> checkpoint.Restored:
    """Returns the newest checkpoint of a workdir."""
    config = trained.load_config(workdir)
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with checkpoint.Checkpointer(f"{workdir}/checkpoints", config.train) as checkpoints:
        return checkpoints.restore(None, abstract)


def assert_the_same(left: checkpoint.Restored, right: checkpoint.Restored) -> None:
    assert left.data_position == right.data_position
    for a, b in zip(jax.tree.leaves(left.state), jax.tree.leaves(right.state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def commit(step: int) -> str:
    return f"checkpoints/{step}/commit_success.txt"


def saving(names: list[str], step: int) -> bool:
    """Returns whether a checkpoint after that step is half written."""
    begun = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    return any(int(each) > step and commit(int(each)) not in names for each in begun)


def kill_inside_a_save(place: Place, run: str, after: int) -> int:
    """Starts a run, kills it inside a save after that step, and returns the step of its newest whole checkpoint."""
    url = f"gs://{BUCKET}/{run}"
    process = place.start(url)
    try:
        while not saving(place.names(run), after):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match=f"{url} is in use by process {process.pid} on host .*another workdir"):
            place.train(url)
    finally:
        process.kill()
    process.communicate()
    assert saving(place.names(run), after), "the save was over before the process was stopped"
    with checkpoint.Checkpointer(f"{url}/checkpoints", trained.load_config(url).train) as checkpoints:
        saved = checkpoints.latest()
    assert saved is not None and saved >= after and files.LOCK in place.names(run)
    assert place.metrics(run)[-1]["step"] >= saved, "metrics come before the checkpoint"
    return saved


def assert_nobody_can_tell(place: Place, run: str, whole: pathlib.Path) -> None:
    assert place.metrics(run) == place.metrics("whole")
    assert_the_same(last(f"gs://{BUCKET}/{run}"), last(whole))
    names = place.names(run)
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"9", "12"}
    assert not saving(names, 0) and files.LOCK not in names and "tokenizer/tokenizer.model" in names


@pytest.fixture(scope="module")
def killed(place, whole) -> str:
    """A run in the bucket that was killed inside a save, and then went on to the end."""
    saved, url = kill_inside_a_save(place, "killed", SAVE_EVERY), f"gs://{BUCKET}/killed"
    assert f"going on from the checkpoint of step {saved} in {url}/checkpoints" in place.train(url)
    return url


def test_a_killed_run_cannot_be_told_from_a_whole_one_in_a_folder(place, whole, killed):
    assert_nobody_can_tell(place, "killed", whole)
    boards = [name for name in place.names("killed") if name.startswith("tensorboard/")]
    assert len(boards) == 2, "one of each start"


def test_a_run_that_is_done_says_so_and_a_longer_one_goes_on(place, killed):
    assert f"going on from the checkpoint of step {STEPS} in {killed}/checkpoints" in place.train(killed)


def test_it_is_evaluated_where_it_lies(place, killed, capsys):
    flags = perplexity.Flags(workdir=killed)
    perplexity.main(trained.config_named(flags), flags)
    assert f"written to {killed}/perplexity.json and {killed}/perplexity.png" in capsys.readouterr().out
    content = place.server.objects[BUCKET, "killed/perplexity.json"].content
    (place.folder / "perplexity.json").write_bytes(content)
    found = perplexity.report.load(place.folder / "perplexity.json")
    assert [column.memory for column in found.columns] == [0, 16] and found.no_memory.tokens > 0
    assert "killed/perplexity.png" in place.server.names(BUCKET)


@pytest.mark.slow
def test_generation_export_and_fine_tuning_read_it(place, killed, tmp_path, capsys):
    flags = generate.Flags(workdir=killed, prompt="alpha ")
    config = trained.config_named(flags)
    assert config.data.tokenizer_file == f"{killed}/tokenizer/tokenizer.model"
    generate.main(config, flags)
    assert len(capsys.readouterr().out) > 10

    flags = conversion.Flags(from_="fot", source=killed, to="longllama", target=str(tmp_path / "long"))
    conversion.main(conversion.load(flags), flags)
    assert (tmp_path / "long" / "tokenizer.model").read_bytes() == bytes(
        place.server.objects[BUCKET, "killed/tokenizer/tokenizer.model"].content
    )

    url = f"gs://{BUCKET}/tuned"
    said = place.train(url, f"--config.train.init_from={killed}", "--config.train.steps=1")
    assert f"beginning with the parameters of step {STEPS} in {killed}/checkpoints" in said


def test_a_workdir_copied_into_a_bucket_and_back_goes_on(place, whole, killed, tmp_path):
    for path in whole.rglob("*"):
        if path.is_file():
            place.server.put(BUCKET, f"copied/{path.relative_to(whole)}", path.read_bytes())
    assert_the_same(last(f"gs://{BUCKET}/copied"), last(whole))
    for name in place.names("killed"):
        files.write(tmp_path / name, lambda file, name=name: file.write(content(place, f"killed/{name}")), "")
    assert_the_same(last(tmp_path), last(whole))


def test_what_is_damaged_or_not_whole_is_as_in_a_folder(place, killed):
    url, newest = f"gs://{BUCKET}/damaged", f"damaged/checkpoints/{STEPS}"
    for name in place.names("killed"):
        place.server.put(BUCKET, f"damaged/{name}", content(place, f"killed/{name}"))
    place.server.put(BUCKET, f"{newest}/position/metadata", b"")
    with pytest.raises(
        CheckpointError, match=f"checkpoint gs://{BUCKET}/{newest} can't be read .* is damaged"
    ) as error:
        last(url)
    assert "\n" not in str(error.value)
    del place.server.objects[BUCKET, f"{newest}/commit_success.txt"]
    assert int(last(url).state.step) == 9


def content(place: Place, name: str) -> bytes:
    return place.server.objects[BUCKET, name].content


@pytest.mark.slow
def test_the_same_command_goes_on_after_kills(place, whole):
    for after in (SAVE_EVERY, 2 * SAVE_EVERY):
        saved = kill_inside_a_save(place, "again", after)
    process = place.start(f"gs://{BUCKET}/again")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"going on from the checkpoint of step {saved} in gs://{BUCKET}/again/checkpoints" in out
    assert_nobody_can_tell(place, "again", whole)


@pytest.mark.slow
def test_sigterm_saves_leaves_the_workdir_to_others_and_is_gone_on_from(place):
    url = f"gs://{BUCKET}/terminated"
    rare = "--config.train.checkpoint_every=100000"
    process = place.start(url, rare, "--config.train.steps=100000")
    for line in iter(process.stderr.readline, ""):
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == cli.RETRY, errors
    step = place.metrics("terminated")[-1]["step"]
    assert commit(step) in place.names("terminated") and files.LOCK not in place.names("terminated")
    said = place.train(url, rare, f"--config.train.steps={step + 1}")
    assert f"going on from the checkpoint of step {step} in {url}/checkpoints" in said


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(place, whole):
    url = f"gs://{BUCKET}/both"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [place.start(url, **shared, JAX_PROCESS_ID=str(number)) for number in range(2)]
    try:
        for process in both:
            out, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in both:
            process.kill()
    names = place.names("both")
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"9", "12"}
    for number in range(2):
        assert any(f"ocdbt.process_{number}" in name for name in names)
    for left, right in zip(place.metrics("both"), place.metrics("whole"), strict=True):
        assert left["batch_checksum"] == right["batch_checksum"]
        np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-5)
    ours, theirs = last(url), last(whole)
    for left, right in zip(jax.tree.leaves(ours.state.params), jax.tree.leaves(theirs.state.params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-4)
