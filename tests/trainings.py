"""What tests of whole trainings share: documents, a small run, kept programs, and metrics without a clock's."""

import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from fot import checkpoint, metrics, train_step
from fot.clock import Speed

ROOT = pathlib.Path(__file__).parent.parent
# For the environment of processes: what one has compiled, however small, the next one finds.
CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


CONFIG = """
from configs import base


def get_config():
    config = base.get_config()
    config.model.layers, config.model.memory_layers, config.model.attention_block = 2, (1,), 16
    config.model.dim, config.model.head_dim, config.model.mlp_dim = 32, 8, 64
    config.crossbatch.d, config.crossbatch.d_schedule = (1, 2), "random"
    config.data.task, config.data.cache_dir = ("files",), {cache!r}
    config.data.tokenizer, config.data.context, config.data.min_document_tokens = "bytes", 16, (32,)
    config.data.held_out_fraction = 0.3
    config.optimizer.schedule = "constant"  # so that a longer run begins like a shorter one
    config.train.steps, config.train.log_every = {steps}, 1
    config.train.evaluate_every, config.train.evaluate_batches = 4, 1
    config.train.checkpoint_every = config.train.keep_every = {save_every}
    config.evaluate.memory, config.evaluate.readers, config.evaluate.modes = (0, 16), ("dense",), ("single_doc",)
    config.evaluate.max_documents, config.evaluate.max_tokens, config.evaluate.block = 2, 64, 16
    return config
"""


def write_documents(folder: pathlib.Path) -> str:
    """Writes twelve documents of random words into a new folder; returns the pattern of their files."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(12):
        words = draw.choices(["alpha ", "beta ", "gamma ", "delta\n"], k=draw.randint(20, 60))
        (folder / f"{number}.txt").write_text("".join(words))
    return str(folder / "*.txt")


def timeless(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what a metrics.jsonl says of each step, but for what a clock says."""
    lines = metrics.read_metrics(path)
    return [{name: value for name, value in line.items() if name not in Speed._fields} for line in lines]


class Place(NamedTuple):
    """Where the processes of these tests find what they share."""

    folder: pathlib.Path
    environment: dict[str, str]

    def flags(self, workdir: str) -> list[str]:
        """Returns the flags of a run of these tests."""
        files = f"--config.data.files={self.folder / 'documents' / '*.txt'}"
        return [f"--config={self.folder / 'run.py'}", f"--workdir={self.folder / workdir}", files]

    def start(self, workdir: str, *flags: str, number: int = 0, **environment: str) -> subprocess.Popen:
        """Starts a training, or one process of it; its output goes to `<workdir>.<number>.out` and `.err`."""
        command = [sys.executable, "-m", "fot.train", *self.flags(workdir), *flags]
        variables = self.environment | environment
        with open(self.said(workdir, "out", number), "w") as out, open(self.said(workdir, "err", number), "w") as err:
            return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=err)

    def said(self, workdir: str, which: str, number: int = 0) -> pathlib.Path:
        """Returns the file of what a process has written to its "out" or "err"."""
        return self.folder / f"{workdir}.{number}.{which}"

    def errors(self, workdir: str, number: int = 0) -> list[str]:
        """Returns the lines on stderr that are not progress."""
        lines = self.said(workdir, "err", number).read_text().splitlines()
        return [line for line in lines if not line.startswith("step ")]

    def metrics(self, workdir: str) -> list[dict[str, Any]]:
        """Returns what metrics.jsonl says of each step, but for what a clock says."""
        return timeless(self.folder / workdir / metrics.FILE)

    def step(self, workdir: str) -> int:
        """Returns the last step in metrics.jsonl, 0 if there is none yet."""
        path = self.folder / workdir / metrics.FILE
        return max([line["step"] for line in metrics.read_metrics(path)], default=0) if path.exists() else 0

    def saves(self, workdir: str) -> list[str]:
        """Returns the names of the folders of checkpoints, complete or not."""
        folder = self.folder / workdir / "checkpoints"
        return sorted(os.listdir(folder)) if folder.exists() else []


def place_in(folder: pathlib.Path, steps: int, save_every: int) -> Place:
    """Writes twelve documents and a config, of so many steps and a checkpoint every few, into a folder."""
    write_documents(folder / "documents")
    text = CONFIG.format(cache=str(folder / "cache"), steps=steps, save_every=save_every)
    (folder / "run.py").write_text(text)
    return Place(folder, os.environ | CACHED | {"JAX_PLATFORMS": "cpu"})


def until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Waits for the condition, looking once a millisecond; fails if a process ends before."""
    while not condition():
        assert all(process.poll() is None for process in processes), "the process ended too early"
        time.sleep(0.001)


def state_of(workdir: pathlib.Path, step: int | None = None) -> checkpoint.Restored:
    """Returns what a checkpoint of a workdir holds, the newest if no step is given, on one device."""
    config = checkpoint.load_config(workdir / "checkpoints")
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return checkpoint.Checkpointer(workdir / "checkpoints", config.train).restore(step, abstract)
