"""Freed memory returns to the system, in a process of its own; and options are for compilers that know them."""

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


def mesh_on(platform: str):
    """As much of a mesh as is asked for."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
def test_freed_arrays_return_to_the_system():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", FREED, word], check=True, capture_output=True).stdout)
        for word in ("plain", "lean")
    )
    assert returned < 20_000 < 150_000 < kept  # kB, of 200 MB


def test_what_a_compiler_does_not_know_is_not_asked_of_it():
    assert lean.compiler_options(mesh_on("tpu")) == {}
    options = lean.compiler_options(mesh_on("cpu"))
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    assert jax.jit(lambda x: x @ x.T, compiler_options=options)(x).tolist() == (x @ x.T).tolist()
