"""Freed memory returns to the system, and layers cost no compilation: in processes of their own.

And options are for compilers that know them.
"""

import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from fot import lean

# Arrays are freed that lie in front of one that stays.
FREED = """
import sys
import numpy as np
from fot import lean

if "lean" in sys.argv:
    lean.return_freed()

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

np.ones(2**20)  # freed at once: from now on glibc keeps arrays of that size
before = resident()
arrays = [np.ones(2**20) for _ in range(25)]
stays = np.ones(2**20)
arrays.clear()
print(resident() - before)
"""

# A model of so many layers, all tiny, reads a text and goes on.
GENERATES = """
import dataclasses
import resource
import sys
from fot import generate, incremental, lean
from tests.generating import TINY, drawn, experiment, one_device, prompts_of

lean.return_freed()
model, mesh = dataclasses.replace(TINY, layers=int(sys.argv[1])), one_device()
config = experiment(model, 64, last_context_length=64, max_new_tokens=2)
params = incremental.prepare(drawn(model), model, mesh)
began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
generate.generate(params, config, prompts_of([200]), mesh)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began)
"""


def mesh_on(platform: str):
    """As much of a mesh as is asked for."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))


def measured(program: str, word: str) -> int:
    """Returns what a program prints that is given that word."""
    done = subprocess.run([sys.executable, "-c", program, word], check=True, capture_output=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
def test_freed_arrays_return_to_the_system():
    kept, returned = (measured(FREED, word) for word in ("plain", "lean"))
    assert returned < 20_000 < 150_000 < kept  # kB, of 200 MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes")
def test_more_layers_take_no_more_memory_to_compile():
    few, many = (measured(GENERATES, layers) for layers in ("3", "18"))
    assert many < few + 20_000  # kB; compiled as one program they would take 60 MB more


def test_what_a_compiler_does_not_know_is_not_asked_of_it():
    assert lean.compiler_options(mesh_on("tpu")) == {}
    options = lean.compiler_options(mesh_on("cpu"))
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    assert jax.jit(lambda x: x @ x.T, compiler_options=options)(x).tolist() == (x @ x.T).tolist()
