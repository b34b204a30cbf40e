"""How long a host takes to save its share of a training state when SIGTERM comes, and what is left if it is cut short.

  python -m benchmarks.saving --directory=/data/somewhere     # LongLLaMA 3B over the 16 hosts of v4:4x4x4
  python -m benchmarks.saving --config=configs/longllama_7b.py --hosts=32 --directory=…
  python -m benchmarks.saving --quick                         # the tiny model: shows that it works, measures nothing

stdout has JSON alone: a line a case. A process of its own holds random arrays, as many as the state has and each of a
host's share of it, has saved them once, and gets SIGTERM: `seconds` are from there to its end, with exit code 42.
"terminated" lets it save; "cut" kills it after half of that time. `newest` is the step of the newest checkpoint then,
2 if the last save was complete, 1 if it was not; it was restored and equals, bit for bit, what was saved.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from fot import cli, train_step
from fot.checkpoint import Checkpointer
from fot.config import ExperimentConfig, from_dict
from fot.termination import Termination

Line = dict[str, Any]

BAR = 30.0  # seconds
QUICK = "configs/code_tiny.py"


def share(config: ExperimentConfig, hosts: int) -> Any:
    """Returns the shapes of one host's share of the training state, a row of numbers for each array."""
    whole = jax.eval_shape(lambda: train_step.init_state(config))
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((-(-x.size // hosts),), x.dtype, sharding=device), whole)


def filled(shapes: Any, seed: int) -> Any:
    """Returns random arrays, which no compression makes smaller than floats of a training are."""
    random = np.random.default_rng(seed)

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        kind = np.float32 if x.dtype == np.float32 else None
        values = random.standard_normal(x.shape, kind) if kind else random.integers(0, 1000, x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(leaf, shapes)


def bytes_of(shapes: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def hold(config: ExperimentConfig, hosts: int, directory: pathlib.Path) -> None:
    """Saves once, says so, and waits for SIGTERM to save again."""
    with Termination() as termination, Checkpointer(directory, config.train) as checkpoints:
        shapes = share(config, hosts)
        checkpoints.save(1, filled(shapes, 1), {}, config)
        checkpoints.wait()
        state = filled(shapes, 2)

        def save() -> str:
            checkpoints.save(2, state, {}, config)
            checkpoints.wait()
            return "step 2 is saved"

        with termination.rescue(save):
            print("ready", flush=True)
            while True:
                time.sleep(1)


def run_case(name: str, file: str, hosts: int, place: pathlib.Path, grace: float) -> Line:
    """Terminates a process that holds a share; after `grace` seconds it is killed."""
    config = from_dict(cli.load_file(file))
    with tempfile.TemporaryDirectory(dir=place, prefix="fot-saving-") as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.saving",
            f"--config={file}",
            f"--hosts={hosts}",
            f"--hold={folder}",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if process.stdout.readline() != "ready\n":
                sys.exit("error: the process that was to save ended; see above")
            began = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            seconds = time.perf_counter() - began
        shapes, reader = share(config, hosts), Checkpointer(folder, config.train)
        newest = reader.latest()
        same = jax.tree.map(_same, reader.restore(newest, shapes).state, filled(shapes, newest))
    leaves = jax.tree.leaves(shapes)
    return {
        "case": name,
        "config": pathlib.Path(file).stem,
        "hosts": hosts,
        "arrays": len(leaves),
        "bytes": bytes_of(shapes),
        "seconds": seconds,
        "exit_code": code,
        "newest": newest,
        "whole": all(jax.tree.leaves(same)),
    }


def _same(left: jax.Array, right: jax.Array) -> bool:
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def main(flags: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/longllama_3b.py", help="the model and its optimizer")
    parser.add_argument("--hosts", type=int, default=16, help="over which the state is spread")
    parser.add_argument("--directory", default=None, help="an existing folder to save in; a temporary one if left out")
    parser.add_argument("--quick", action="store_true", help="the tiny model")
    parser.add_argument("--hold", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(flags)
    file = QUICK if arguments.quick else arguments.config
    if arguments.hold:
        hold(from_dict(cli.load_file(file)), arguments.hosts, pathlib.Path(arguments.hold))
    line = run_case("terminated", file, arguments.hosts, arguments.directory, 20 * BAR)
    met = None if arguments.quick else line["exit_code"] == cli.RETRY and line["newest"] == 2 and line["seconds"] <= BAR
    print(json.dumps(line), flush=True)
    print(json.dumps(run_case("cut", file, arguments.hosts, arguments.directory, line["seconds"] / 2)), flush=True)
    bar = {"bar": "seconds to a complete checkpoint", "value": line["seconds"], "limit": BAR, "must_be": "at most"}
    print(json.dumps(bar | {"met": met}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
