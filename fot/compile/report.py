"""What compiling the train step for a topology tells: memory, collectives, FLOPs, a bound and an estimate of time."""

import collections
import dataclasses
import re
import time

import jax
from jax.sharding import Mesh

from fot import sharding, train_step
from fot.compile import costs, generations, hlo
from fot.compile.groups import mesh_axes
from fot.config import ExperimentConfig, accelerators
from fot.config.accelerators import GIB, Generation

OUTSIDE = "between slices"  # over the data center's network
_SHOWN = 5  # arrays and operations in a report
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes.

    Attributes:
      arguments: training state and batch.
      outputs: the new state and metrics.
      aliased: outputs that take the place of arguments.
      temporaries: activations, gradients and all else, at the peak.
      live: arguments + outputs - aliased + temporaries.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    live: int
    code: int


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind along the same mesh axes.

    Attributes:
      kind: such as "all-gather".
      axes: mesh axes along which the devices of a group differ, joined by ×; "none" for groups of one; `OUTSIDE`.
      devices: in a group; slices if `OUTSIDE`.
      runs: in a step, loops counted.
      bytes: that one device sends in a step, if each group is a ring.
    """

    kind: str
    axes: str
    devices: int
    runs: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least, if all went at the hardware's peak and at the same time.

    Attributes:
      compute: model FLOPs at the peak of bfloat16; what remat computes again isn't among them.
      hbm: arguments read, outputs written, temporaries written and read, once each.
      interconnect: bytes of the collectives over all links; those `OUTSIDE` aren't among them.
    """

    compute: float
    hbm: float
    interconnect: float

    @property
    def step(self) -> float:
        """The largest of the three."""
        return max(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A compile-time estimate: the compiler's cost model, not a measurement; without collectives and stalls.

    Attributes:
      cycles: estimated cycles × trip counts, those of kernels among them.
      kernels: cycles of Pallas kernels, for which the compiler has no estimate: what they say that they do, at the
        hardware's peak. Less than they will take: the compiler's schedules of attention come to three times that.
      seconds: of these cycles at the generation's clock.
      unknown_loops: loops counted once, as their trip count isn't known.
    """

    cycles: int
    kernels: int
    seconds: float
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a step that compiled; see the classes of the fields.

    Attributes:
      memory: of a device.
      collectives: most bytes first.
      bound: of the step's time.
      estimate: of the step's time.
      largest: the largest arrays.
      costliest: the operations with the most estimated cycles.
    """

    memory: Memory
    collectives: tuple[Moved, ...]
    bound: Bound
    estimate: Estimate
    largest: tuple[costs.Array, ...]
    costliest: tuple[costs.Cost, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """One compilation.

    Attributes:
      topology: such as "v4:4x4x4".
      slices: of that topology.
      devices: of all slices.
      mesh: size of each axis.
      d: crossbatch dimension.
      remat: `model.remat`.
      accumulation: `train.accumulation`.
      usable: HBM of a device, bytes.
      needed: HBM that the step needs, bytes: its live memory and code, or what the compiler says when that is too much.
      model_flops: of a step, all devices together, by the formula of `fot.flops`.
      compile_seconds: that the compiler took here.
      fits: whether the compiler found room for the step, and needed what is usable at most.
      program: of a step that compiled; None if it didn't for want of memory.
      compiler: why it didn't, in the compiler's words; "" if it did.
    """

    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    d: int
    remat: str
    accumulation: int
    usable: int
    needed: int
    model_flops: int
    compile_seconds: float
    fits: bool
    program: Program | None
    compiler: str


def examine(config: ExperimentConfig, topology: str, d: int, effort: float, slices: int = 1) -> Report:
    """Compiles the train step of one d for slices of a topology.

    Args:
      config: the run; its mesh is laid over the devices of all slices.
      topology: such as "v4:4x4x4".
      d: crossbatch dimension.
      effort: of the compiler's search for a fast program: 0 is that of training, -1 the least.
      slices: of that topology.

    Raises:
      UserError: an unknown topology, libtpu isn't installed, or the mesh doesn't fit devices or model.
    """
    generation = accelerators.check(topology)
    mesh = sharding.make_mesh(config.mesh, generations.devices(topology, slices))
    sharding.check_mesh(mesh, config)
    lowered, began = train_step.lower_step(config, mesh, d), time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": float(effort)})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, message = None, " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED: ").split())
    seconds = time.perf_counter() - began
    model_flops = train_step.step_flops(config, d)
    program = None if compiled is None else read(compiled, mesh, slices, generation, model_flops)
    needed = exhausted(message) if program is None else program.memory.live + program.memory.code
    return Report(
        topology=topology,
        slices=slices,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        d=d,
        remat=config.model.remat,
        accumulation=config.train.accumulation,
        usable=generation.hbm,
        needed=needed,
        model_flops=model_flops,
        compile_seconds=seconds,
        # The compiler lets some programs pass that are larger than what it grants.
        fits=program is not None and needed <= generation.hbm,
        program=program,
        compiler=message if program is None else "",
    )


def exhausted(message: str) -> int:
    """Returns the bytes that the compiler says were needed, 0 if it says no number: the first size in its message."""
    size = re.search(r"(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)
    return int(float(size[1]) * _UNITS[size[2]]) if size else 0


def read(compiled: jax.stages.Compiled, mesh: Mesh, slices: int, generation: Generation, model_flops: int) -> Program:
    """Returns what a step tells that was compiled for a mesh of so many slices; `model_flops` of all devices."""
    sizes = compiled.memory_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        live=sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    program = hlo.parse(compiled.as_text())
    moved, cycles = collectives(program, dict(mesh.shape), slices), costs.cycles(program)
    bound = Bound(
        compute=model_flops / mesh.size / generation.peak,
        hbm=(memory.arguments + memory.outputs + 2 * memory.temporaries) / generation.bandwidth,
        interconnect=sum(each.bytes for each in moved if each.axes != OUTSIDE) / generation.interconnect,
    )
    kernels = generation.cycles(*costs.kernels(program))
    total = cycles.total + kernels
    estimate = Estimate(total, kernels, total / generation.clock, cycles.unknown_loops)
    return Program(memory, moved, bound, estimate, costs.largest(program, _SHOWN), costs.costliest(program, _SHOWN))


def collectives(program: hlo.Program, mesh: dict[str, int], slices: int = 1) -> tuple[Moved, ...]:
    """Returns the collectives of a program, those alike added up, most bytes first."""
    runs, sent = collections.Counter(), collections.Counter()
    for each in costs.collectives(program):
        axes = " × ".join(mesh_axes(each.groups, mesh)) or "none"
        runs[each.kind, axes, each.size] += each.runs
        sent[each.kind, axes, each.size] += each.sent_bytes
    for each in costs.outside(program):
        runs[each.kind, OUTSIDE, slices] += each.runs
        sent[each.kind, OUTSIDE, slices] += each.sent_bytes
    return tuple(Moved(*key, runs[key], count) for key, count in sent.most_common())
