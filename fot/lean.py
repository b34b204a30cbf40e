"""What keeps the peak memory of a process on the CPU low; no result changes."""

import ctypes
import sys

from jax.sharding import Mesh

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE = 2**20  # bytes

# XLA's CPU backend runs what doesn't depend on each other in the order that frees buffers late, unless told.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns options of `jax.jit` for programs with large intermediate arrays on that mesh."""
    return _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def return_freed() -> None:
    """Makes this process give large arrays back to the system when they are freed; does nothing without glibc.

    Left alone, glibc keeps those of up to 32 MiB for itself once one of that size was freed.
    """
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "mallopt", lambda field, value: 0)(_MMAP_THRESHOLD, _LARGE)
