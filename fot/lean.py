"""What keeps the peak memory of a process on the CPU low; no result changes."""

import ctypes
import functools
import sys

import jax
from jax.sharding import Mesh

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_ARENA_MAX = -8  # M_ARENA_MAX
_LARGE = 2**20  # bytes
_COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that a program is compiled

# Left alone, XLA's CPU backend orders what could run side by side first, and holds the buffers of all of it.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns options of `jax.jit` for programs with large intermediate arrays on that mesh."""
    return _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


@functools.cache  # one listener, however often it is called
def return_freed() -> None:
    """Makes this process give freed memory back to the system; without glibc it does nothing.

    Left alone, glibc keeps arrays of up to 32 MiB for itself once one of that size was freed, what a compilation used
    as long as something lies behind it, and for each thread that allocates what another one can't use.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"):
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    libc.mallopt(_ARENA_MAX, 1)

    def trim(event: str, seconds: float, **details: str) -> None:
        if event == _COMPILED:
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(trim)
