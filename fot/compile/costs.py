"""What a compiled program moves, makes and may cost, over all runs of its loops."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from fot.compile import hlo
from fot.compile.groups import Groups, groups
from fot.compile.hlo import Computation, Instruction, Program

# What a device sends in a ring, in units of its operand, by the number of devices in the ring.
SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
_OUTSIDE = re.compile(r'="xla_megascale_runtime",_xla_host_transfer_rendezvous="([a-z-]+)')
_MAKES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")


class Collective(NamedTuple):
    """A collective instruction, by all its runs in one execution of the program.

    Attributes:
      kind: a key of `SENT`; a fusion that all-reduces and keeps its own part is a reduce-scatter.
      groups: devices that exchange with each other, numbered as in the flattened mesh; pairs of a permute.
      operand_bytes: of the operands on one device.
      runs: how often it runs, loops counted.
    """

    kind: str
    groups: Groups
    operand_bytes: int
    runs: int

    @property
    def size(self) -> int:
        """Devices in a group."""
        return max(map(len, self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends in all runs, if the group is a ring."""
        return int(self.runs * self.operand_bytes * SENT[self.kind](self.size)) if self.size > 1 else 0


class Cycles(NamedTuple):
    """The compiler's estimate for one execution on one device, collectives left out.

    Attributes:
      total: cycles, loop bodies times their trip counts; of conditionals every branch is counted.
      unknown_loops: loops whose trip count the text doesn't tell, counted once.
    """

    total: int
    unknown_loops: int


class Kernels(NamedTuple):
    """What Pallas kernels say that they do in one execution on one device, of which the compiler estimates no cycles.

    Attributes:
      flops: of their products.
      bytes: that they read and write in HBM.
    """

    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that the program makes: type and shape, the JAX operation that it comes from, bytes on one device."""

    shape: str
    source: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Estimated cycles of all that comes from one JAX operation."""

    source: str
    cycles: int


def cycles(program: Program) -> Cycles:
    """Returns the compiler's estimate of cycles; 0 where it writes none, as on a CPU."""
    runs = hlo.runs(program)
    total = sum(run.times * _estimate(instruction) for run in runs for instruction in run.computation.values())
    return Cycles(total, sum(run.unknown for run in runs))


# Products of each pair of a query and a key that JAX's splash attention forms in its kernels, which declare no cost.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernels(program: Program) -> Kernels:
    """Returns the sums of the kernels' own cost estimates, over all runs; of splash attention, by its shapes."""
    flops = size = 0
    for run in hlo.runs(program):
        for instruction in run.computation.values():
            cost = _declared(instruction) or _splash(run.computation, instruction)
            flops, size = flops + run.times * cost.flops, size + run.times * cost.bytes
    return Kernels(flops, size)


def _declared(instruction: Instruction) -> Kernels | None:
    found = re.search(
        r'"cost_estimate":\{"flops":"?(\d+)"?,"transcendentals":"?\d+"?,"bytes_accessed":"?(\d+)',
        instruction.attributes,
    )
    return Kernels(int(found[1]), int(found[2])) if found else None


def _splash(computation: Computation, instruction: Instruction) -> Kernels:
    """Returns what a kernel of causal splash attention does; nothing, if it is none."""
    found = re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name)
    if instruction.opcode != "custom-call" or not found:
        return Kernels(0, 0)
    operands = [computation[name].shape for name in instruction.operands if name in computation]
    # The queries come first of the floats: heads, of all rows if there are several, tokens and numbers of a head.
    *many, tokens, head_dim = next(_dims(each) for each in operands if _floats(each))
    pairs = math.prod(many) * tokens**2 // 2
    moved = sum(map(hlo.shape_bytes, (*operands, instruction.shape)))
    return Kernels(2 * _SPLASH_PRODUCTS[found[0]] * pairs * head_dim, moved)


def _floats(shape: str) -> bool:
    [(kind, _)] = hlo.arrays(shape)
    return kind in ("bf16", "f32")


def _dims(shape: str) -> tuple[int, ...]:
    [(_, dims)] = hlo.arrays(shape)
    return tuple(int(n) for n in dims.split(",") if n)


def costliest(program: Program, count: int) -> tuple[Cost, ...]:
    """Returns the operations with the most estimated cycles."""
    costs: collections.Counter[str] = collections.Counter()
    for run in hlo.runs(program):
        for instruction in run.computation.values():
            costs[_source(instruction)] += run.times * _estimate(instruction)
    return tuple(Cost(*pair) for pair in costs.most_common(count) if pair[1] > 0)


def largest(program: Program, count: int) -> tuple[Array, ...]:
    """Returns the largest arrays that the program makes, those of one type and shape once; not its arguments."""
    found: dict[str, Array] = {}
    for run in hlo.runs(program):
        for instruction in run.computation.values():
            if instruction.opcode not in _MAKES_NOTHING:
                for kind, dims in hlo.arrays(instruction.shape):
                    shape = f"{kind}[{dims}]"
                    found.setdefault(shape, Array(shape, _source(instruction), hlo.shape_bytes(shape)))
    return tuple(sorted(found.values(), key=lambda array: -array.bytes)[:count])


def _estimate(instruction: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else 0


def _source(instruction: Instruction) -> str:
    """Returns the JAX operation that an instruction comes from, else its opcode."""
    found = re.search(r'op_name="(?:jit\([^/]*\)/)?([^"]*)"', instruction.attributes)
    return found[1] if found and found[1] else instruction.opcode


def collectives(program: Program) -> list[Collective]:
    """Returns the collectives of all that runs, those inside fusions included."""
    return [
        Collective(
            kind, groups(instruction.attributes, program.devices), _operand_bytes(computation, instruction), times
        )
        for run, times, _ in hlo.runs(program)
        for computation, instruction, kind in _operations(program, run)
        if kind in SENT
    ]


class Outside(NamedTuple):
    """A device's part of a collective between slices, which the compiler makes a transfer through the host.

    Attributes:
      kind: of the collective, as the compiler names it.
      sent_bytes: that one device hands over in all runs.
      runs: how often it runs, loops counted.
    """

    kind: str
    sent_bytes: int
    runs: int


def outside(program: Program) -> list[Outside]:
    """Returns what leaves the slice."""
    return [
        Outside(found[1], times * _operand_bytes(computation, instruction), times)
        for computation, times, _ in hlo.runs(program)
        for instruction in computation.values()
        if instruction.opcode == "send" and (found := _OUTSIDE.search(instruction.attributes))
    ]


def _operations(program: Program, computation: Computation) -> Iterator[tuple[Computation, Instruction, str]]:
    """Yields the instructions of a computation and of its fusions, each with where it stands and what it does.

    A fusion of an all-reduce and the slice of it that the device keeps is the TPU's form of a reduce-scatter.
    """
    for instruction in computation.values():
        yield computation, instruction, instruction.opcode.removesuffix("-start")
        if instruction.opcode == "fusion":
            fused = program.computations[hlo.named(instruction.attributes, "calls")[0]]
            for place, inner, kind in _operations(program, fused):
                keeps = kind == "all-reduce" and any(user.opcode == "dynamic-slice" for user in _users(place, inner))
                yield place, inner, "reduce-scatter" if keeps else kind


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(hlo.shape_bytes(computation[name].shape) for name in instruction.operands if name in computation)


def _users(computation: Computation, instruction: Instruction) -> list[Instruction]:
    return [other for other in computation.values() if instruction.name in other.operands]
