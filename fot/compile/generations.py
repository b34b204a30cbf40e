"""What a TPU generation offers, and devices of a pod that isn't there, for the compiler to compile for."""

import difflib
import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from fot.config.checks import nearest
from fot.errors import UserError

GIB = 2**30


class Generation(NamedTuple):
    """Facts of one device, as JAX counts them: a core of v2, v3 and tpu7x, a chip of the others.

    Attributes:
      peak: bfloat16 floating point operations a second.
      hbm: bytes that programs can use.
      bandwidth: of HBM, bytes a second.
      interconnect: bytes a second that all of a device's links send together.
      clock: cycles a second.
      largest: chips along each dimension of the largest pod.
    """

    peak: float
    hbm: int
    bandwidth: float
    interconnect: float
    clock: float
    largest: tuple[int, ...]


# Google's published figures of chips, halved where a device is a core; `hbm` is what the compiler grants.
GENERATIONS = {
    "v2": Generation(23e12, int(7.5 * GIB), 350e9, 124e9, 0.7e9, (16, 16)),
    "v3": Generation(61.5e12, int(15.48 * GIB), 450e9, 164e9, 0.94e9, (32, 32)),
    "v4": Generation(275e12, int(30.75 * GIB), 1228e9, 300e9, 1.05e9, (16, 16, 16)),
    "v5e": Generation(197e12, int(15.75 * GIB), 819e9, 200e9, 1.5e9, (16, 16)),
    "v5p": Generation(459e12, int(95.74 * GIB), 2765e9, 600e9, 1.75e9, (16, 20, 28)),
    "v6e": Generation(918e12, int(31.25 * GIB), 1638e9, 448e9, 1.75e9, (16, 16)),
    "tpu7x": Generation(1153.5e12, int(94.75 * GIB), 3690e9, 600e9, 2.2e9, (16, 24, 24)),
}
# Those that `--topology=all` stands for.
TOPOLOGIES = ("v3:8x8", "v4:2x2x1", "v4:4x4x4", "v4:4x4x8", "v5e:16x16", "v5p:4x4x8")
_CHIP = {"v4": {"chip_config_name": "megacore"}}  # its two cores are one device
# libtpu asks a cloud's metadata where it runs unless it is told; and two processes may compile at once.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}


def check(topology: str) -> Generation:
    """Returns the generation of a topology such as "v4:4x4x4".

    Raises:
      UserError: no such generation or shape; the message has the nearest name.
    """
    name, _, shape = topology.partition(":")
    if name not in GENERATIONS:
        hint = nearest(name, GENERATIONS) or f"; choose from {', '.join(GENERATIONS)}"
        raise UserError(f"topology {topology!r}: unknown generation {name!r}{hint}")
    generation = GENERATIONS[name]
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if len(sizes) != len(generation.largest) or any(
        not 0 < size <= most for size, most in zip(sizes, generation.largest, strict=True)
    ):
        most = "x".join(map(str, generation.largest))
        example = alike(topology)
        raise UserError(f"topology {topology!r}: chips of {name} come in shapes up to {most}, such as {example!r}")
    return generation


def alike(topology: str) -> str:
    """Returns the most alike name of the same generation in `TOPOLOGIES`, or that of its smallest pod."""
    name = topology.partition(":")[0]
    smallest = {2: f"{name}:2x2", 3: f"{name}:2x2x1"}[len(GENERATIONS[name].largest)]
    known = [each for each in TOPOLOGIES if each.startswith(f"{name}:")] or [smallest]
    return max(known, key=lambda each: difflib.SequenceMatcher(None, topology, each).ratio())


def devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology: to compile for, not to run on.

    Raises:
      UserError: libtpu is not installed, or it doesn't know the topology.
    """
    check(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU's compiler, libtpu, is not installed: pip install -c constraints.txt -e '.[tpu]'")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chip = _CHIP.get(topology.partition(":")[0], {})
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip).devices)
    except jax.errors.JaxRuntimeError as error:
        message = str(error).partition(": ")[2] or str(error)
        raise UserError(f"topology {topology!r}: {message}; try {alike(topology)!r}") from None
