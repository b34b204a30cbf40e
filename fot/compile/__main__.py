"""Compiles the train step for a TPU pod that isn't there: whether it fits, what it sends, what it may cost.

  python -m fot.compile --config=configs/longllama_3b.py --topology=v4:4x4x4
  python -m fot.compile --config=configs/longllama_3b.py --topology=all --output=compiled.json

The compiler is that of the TPU (extra `tpu`) and runs on any machine. A topology is a generation and its chips,
generation:AxB or generation:AxBxC; `all` is a choice of them. The step is that of the largest crossbatch d, with the
config's mesh, which takes --config.mesh.* like any field. When it does not fit, a few other settings are compiled.

Times are a bound and the compiler's own estimate, never measured. Exit codes: 0, also for a step that doesn't fit;
2 an error, told in one line.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from fot import cli, files
from fot.compile import generations, report, search, table
from fot.compile.report import Report
from fot.compile.search import Tried
from fot.config import ExperimentConfig, accelerators
from fot.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      topology: generation:AxB or generation:AxBxC, such as v4:4x4x4; or all.
      slices: of that topology, joined by the data center's network; the mesh is laid over all.
      d: crossbatch dimension of the step, one of `crossbatch.d`; 0 is the largest.
      effort: of the compiler: 0 as in training; -1 compiles several times faster to about the same memory, but to a
        slower program, so compare estimates of the same effort only.
      search: compile other meshes, remat and accumulation too, even if the step fits, and suggest the best.
      tries: how many other settings are compiled; 0 is none.
      output: JSON file for all reports; "" writes none.
    """

    topology: str
    slices: int = 1
    d: int = 0
    effort: float = 0.0
    search: bool = False
    tries: int = 4
    output: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One topology.

    Attributes:
      topology: its name.
      report: with the config's own mesh; None if that doesn't fit the devices.
      reason: why there is no report; "" if there is one.
      tried: reports of other settings.
      suggested: the best of them, None if none fits.
    """

    topology: str
    report: Report | None
    reason: str
    tried: tuple[Report, ...]
    suggested: Report | None


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    d = flags.d or max(config.crossbatch.d)
    if d not in config.crossbatch.d:
        raise UserError(f"--d={d} is not among crossbatch.d={config.crossbatch.d}: --config.crossbatch.d={d} adds it")
    if not -1 <= flags.effort <= 1:
        raise UserError(f"--effort={flags.effort} must be from -1 to 1")
    if flags.slices < 1:
        raise UserError(f"--slices={flags.slices} must be 1 or more")
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is taken
    names = accelerators.TOPOLOGIES if flags.topology == "all" else (flags.topology,)
    for name in names:
        accelerators.check(name)
    rows = [_row(config, name, d, flags) for name in names]
    if len(rows) > 1:
        print(table.summary([(row.topology, row.report or row.reason) for row in rows]))
    if flags.output:
        _write(pathlib.Path(flags.output), rows)


def _row(config: ExperimentConfig, topology: str, d: int, flags: Flags) -> Row:
    """Compiles for one topology, prints what it tells, and searches if need be."""
    examine = functools.partial(report.examine, topology=topology, slices=flags.slices, d=d, effort=flags.effort)
    first, reason, devices = None, "", len(generations.devices(topology, flags.slices))
    try:
        first = examine(config)
        print(table.full(first), flush=True)
    except ConfigError as error:
        if flags.topology != "all" and not flags.search:
            raise UserError(f"{error}{_hint(search.candidates(config, devices, 1))}") from None
        reason = str(error)
        print(f"{topology}: {reason}", flush=True)
    tried = Tried([])
    others = search.candidates(config, devices, first.needed / first.usable if first else 1)
    if flags.search:
        tried = search.all_of(others, flags.tries, functools.partial(_shown, examine))
    elif first is None or not first.fits:
        tried = search.until_it_fits(others, flags.tries, functools.partial(_shown, examine))
    best = Tried([*([first] if first else []), *tried.reports]).best
    suggested = None if best is first else best
    if suggested is not None:
        print(f"  suggested: {table.settings(suggested)}\n{table.full(suggested)}", flush=True)
    elif tried.reports:
        print("  nothing better was found; --tries=N tries more", flush=True)
    return Row(topology, first, reason, tuple(tried.reports), suggested)


def _hint(others: list[ExperimentConfig]) -> str:
    if not others:
        return ""
    mesh = others[0].mesh
    return (
        f"; --config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp} --config.mesh.tensor={mesh.tensor} would do"
    )


def _shown(examine: Any, config: ExperimentConfig) -> Report:
    done = examine(config)
    print(f"  tried {table.settings(done)}: {table.verdict(done)}", flush=True)
    return done


def _write(path: pathlib.Path, rows: list[Row]) -> None:
    files.write_json(path, [dataclasses.asdict(row) for row in rows], "choose another --output")
    print(f"reports in {path}")


if __name__ == "__main__":
    cli.run(main, Flags, usage=__doc__)
