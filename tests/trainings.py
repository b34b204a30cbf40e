"""What tests of whole trainings share: documents, kept programs, and metrics without what a clock says."""

import pathlib
import random
from typing import Any

from fot import metrics
from fot.clock import Speed

# For the environment of processes: what one has compiled, however small, the next one finds.
CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


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
