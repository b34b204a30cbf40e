"""What each TPU generation offers, and by which names clouds know it: one table for the compiler and the launcher."""

import difflib
import math
import re
from typing import NamedTuple

from fot.config.checks import nearest
from fot.errors import UserError

GIB = 2**30


class Generation(NamedTuple):
    """Facts of one device, as JAX counts them (a core of v2, v3 and tpu7x, a chip of the others), and names.

    Attributes:
      peak: bfloat16 floating point operations a second.
      hbm: bytes that programs can use.
      bandwidth: of HBM, bytes a second.
      interconnect: bytes a second that all of a device's links send together.
      clock: cycles a second.
      largest: chips along each dimension of the largest pod.
      devices: of a chip.
      host_chips: chips of each host of a slice of several hosts.
      single_chips: sizes in chips of slices that are one host of as many chips.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator; "" if the launcher doesn't serve it there.
      machine: GKE's machine type, without the "-4t" of its chips.
      queued: prefix of its accelerator types, as of --accelerator-type; "" if there are no queued resources of it.
      queued_units: of a chip in the number of an accelerator type: cores of v4 and v5p, chips of v5e and v6e.
      runtime: TPU software version for JAX.
    """

    peak: float
    hbm: int
    bandwidth: float
    interconnect: float
    clock: float
    largest: tuple[int, ...]
    devices: int = 1
    host_chips: int = 4
    single_chips: tuple[int, ...] = (4,)
    gke: str = ""
    machine: str = ""
    queued: str = ""
    queued_units: int = 1
    runtime: str = ""

    def cycles(self, flops: int, size: int) -> int:
        """Returns the cycles that so many operations, and bytes from and to HBM, take at the peak, at the same time."""
        return int(self.clock * max(flops / self.peak, size / self.bandwidth))


# Google's published figures of chips, halved where a device is a core; `hbm` is what the compiler grants. Names are
# those of "Plan TPUs in GKE", "TPU configurations" and "TPU software versions" of its documentation.
GENERATIONS = {
    "v2": Generation(23e12, int(7.5 * GIB), 350e9, 124e9, 0.7e9, (16, 16), devices=2),
    "v3": Generation(61.5e12, int(15.48 * GIB), 450e9, 164e9, 0.94e9, (32, 32), devices=2),
    "v4": Generation(
        *(275e12, int(30.75 * GIB), 1228e9, 300e9, 1.05e9, (16, 16, 16)),
        gke="tpu-v4-podslice",
        machine="ct4p-hightpu",
        queued="v4",
        queued_units=2,
        runtime="tpu-ubuntu2204-base",
    ),
    "v5e": Generation(
        *(197e12, int(15.75 * GIB), 819e9, 200e9, 1.5e9, (16, 16)),
        single_chips=(1, 4, 8),
        gke="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu",
        queued="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
    ),
    "v5p": Generation(
        *(459e12, int(95.74 * GIB), 2765e9, 600e9, 1.75e9, (16, 20, 28)),
        gke="tpu-v5p-slice",
        machine="ct5p-hightpu",
        queued="v5p",
        queued_units=2,
        runtime="v2-alpha-tpuv5",
    ),
    "v6e": Generation(
        *(918e12, int(31.25 * GIB), 1638e9, 448e9, 1.75e9, (16, 16)),
        single_chips=(1, 4, 8),
        gke="tpu-v6e-slice",
        machine="ct6e-standard",
        queued="v6e",
        runtime="v2-alpha-tpuv6e",
    ),
    "tpu7x": Generation(
        *(1153.5e12, int(94.75 * GIB), 3690e9, 600e9, 2.2e9, (16, 24, 24)),
        devices=2,
        gke="tpu7x",
        machine="tpu7x-standard",
    ),
}
# Slices of two dimensions that clouds offer; there are no others of v5e and v6e.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Those that `--topology=all` of fot.compile stands for.
TOPOLOGIES = ("v3:8x8", "v4:2x2x1", "v4:4x4x4", "v4:4x4x8", "v5e:16x16", "v5p:4x4x8")


class Slice(NamedTuple):
    """One slice: its generation's name, and chips along each dimension."""

    name: str
    shape: tuple[int, ...]

    @property
    def generation(self) -> Generation:
        """Facts of its generation."""
        return GENERATIONS[self.name]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices of the slice, as JAX counts them."""
        return self.chips * self.generation.devices

    @property
    def host_chips(self) -> int:
        """Chips of each of its hosts."""
        return self.chips if self.chips in self.generation.single_chips else self.generation.host_chips

    @property
    def hosts(self) -> int:
        """Hosts of the slice."""
        return self.chips // self.host_chips

    @property
    def topology(self) -> str:
        """Its shape as clouds write it, such as 4x4x8."""
        return "x".join(map(str, self.shape))


def check(topology: str) -> Generation:
    """Returns the generation of a topology such as "v4:4x4x4".

    Raises:
      UserError: no such generation or shape; the message has the nearest name.
    """
    return parse(topology).generation


def parse(topology: str) -> Slice:
    """Returns the slice that a topology such as "v4:4x4x4" names; raises as `check` does."""
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
    return Slice(name, tuple(sizes))


def offered(topology: str) -> Slice:
    """Returns the slice of a topology that clouds offer; `parse` takes any that fits into a pod.

    Raises:
      UserError: clouds don't offer it; the message has one that they do.
    """
    found = parse(topology)
    flat = len(found.shape) == 2
    cubes = found.shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)) or all(size % 4 == 0 for size in found.shape)
    if not (found.topology in FLAT if flat else cubes):
        rule = f"one of {', '.join(FLAT)}" if flat else "2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4"
        raise UserError(f"topology {topology!r}: slices of {found.name} are {rule}")
    return found


def alike(topology: str) -> str:
    """Returns the most alike name of the same generation in `TOPOLOGIES`, or that of its smallest pod."""
    name = topology.partition(":")[0]
    smallest = {2: f"{name}:2x2", 3: f"{name}:2x2x1"}[len(GENERATIONS[name].largest)]
    known = [each for each in TOPOLOGIES if each.startswith(f"{name}:")] or [smallest]
    return max(known, key=lambda each: difflib.SequenceMatcher(None, topology, each).ratio())
