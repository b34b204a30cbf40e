"""Reports of compilations as text to print."""

import dataclasses
from collections.abc import Sequence

from fot.compile.report import Program, Report
from fot.config.accelerators import GIB
from fot.evaluate.text import aligned


def settings(report: Report) -> str:
    """Returns mesh, remat and accumulation as flags of the command line."""
    axes = [f"--config.mesh.{axis}={size}" for axis, size in report.mesh.items()]
    model, train = f"--config.model.remat={report.remat}", f"--config.train.accumulation={report.accumulation}"
    return " ".join([*axes, model, train])


def full(report: Report) -> str:
    """Returns all of a report, some lines."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "of one device"
    lines = [
        f"{_slices(report)}: {report.devices} devices, mesh {mesh}, d = {report.d}, remat={report.remat}, "
        f"accumulation={report.accumulation}; compiled in {report.compile_seconds:.0f} s",
        f"  {verdict(report)}",
    ]
    if report.program is not None:
        lines += [f"  {line}" for line in _program(report.program)]
    lines.append(f"  model FLOPs of a step, by formula: {report.model_flops:.3e}")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Returns whether the step fits and by how much."""
    sizes = f"{_gib(report.needed)} GiB of {_gib(report.usable)} a device"
    if report.fits:
        return f"fits: {sizes}, {_gib(report.usable - report.needed)} left"
    return f"does not fit: {report.compiler or f'{sizes}, {_gib(report.needed - report.usable)} too many'}"


def _program(program: Program) -> list[str]:
    bound, estimate = program.bound, program.estimate
    sizes = [f"{name} {_gib(size)}" for name, size in dataclasses.asdict(program.memory).items()]
    rows = [
        (each.kind, each.axes, f"{each.devices}", f"{each.runs:,}", f"{each.bytes / GIB:.3f}")
        for each in program.collectives
    ]
    lines = [f"HBM of a device, GiB: {', '.join(sizes)}"]
    lines += ["largest arrays of a device, GiB"]
    lines += [f"  {_gib(array.bytes):>5}  {array.shape}  {array.source}" for array in program.largest]
    header = ("collectives", "mesh axis", "devices", "runs a step", "GiB sent by a device")
    lines += aligned([header, *rows], left=len(header))
    times = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in dataclasses.asdict(bound).items())
    lines.append(f"roofline bound of a step: at least {1e3 * bound.step:.1f} ms ({times})")
    lines.append(
        f"compile-time estimate, not a measurement: {estimate.cycles:.3e} cycles, {1e3 * estimate.seconds:.1f} ms "
        "without collectives"
    )
    if estimate.kernels:
        lines.append(f"  {estimate.kernels / estimate.cycles:4.0%}  Pallas kernels, at the hardware's peak")
    for cost in program.costliest:
        lines.append(f"  {cost.cycles / estimate.cycles:4.0%}  {cost.source}")
    if estimate.unknown_loops:
        lines.append(f"  {estimate.unknown_loops} loops of unknown length are counted once")
    return lines


def summary(rows: Sequence[tuple[str, Report | str]]) -> str:
    """Returns a line for each topology: its report, or why there is none."""
    header = ("topology", "devices", "GiB needed", "GiB usable", "fits", "estimate, ms", "bound, ms")
    lines = [header]
    for topology, report in rows:
        if isinstance(report, str):
            lines.append((topology, *6 * ("-",)))
            continue
        program = report.program
        times = ("-", "-")
        if program is not None:
            times = f"{1e3 * program.estimate.seconds:.1f}", f"{1e3 * program.bound.step:.1f}"
        fits = "yes" if report.fits else "no"
        lines.append((topology, f"{report.devices}", _gib(report.needed), _gib(report.usable), fits, *times))
    notes = [f"{topology}: {reason}" for topology, reason in rows if isinstance(reason, str)]
    explained = "estimate: a compile-time estimate, not a measurement, without collectives"
    return "\n".join([*aligned(lines, left=len(header)), explained, *notes])


def _slices(report: Report) -> str:
    return report.topology if report.slices == 1 else f"{report.slices} × {report.topology}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
