"""A small search for a mesh, remat and accumulation with which the train step fits."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fot.compile.report import Report
from fot.config import ExperimentConfig, MeshConfig
from fot.config import mesh as config_mesh
from fot.config.model import REMATS
from fot.errors import ConfigError

_FACTORS = (1, 2, 4, 8)
_FSDP = (16, -1)  # beside the config's own; -1 is all devices that tensor leaves


class Tried(NamedTuple):
    """What was compiled, in order."""

    reports: list[Report]

    @property
    def best(self) -> Report | None:
        """The report that fits with the least compile-time estimate, collectives at the bound's speed; None fits."""
        return min(filter(lambda report: report.fits, self.reports), key=seconds, default=None)


def seconds(report: Report) -> float:
    """Returns by what fitting programs are compared: estimated cycles and the bound of the collectives, in seconds."""
    return report.program.estimate.seconds + report.program.bound.interconnect


def candidates(config: ExperimentConfig, devices: int, shrink: float) -> list[ExperimentConfig]:
    """Returns configs that so many devices can hold in equal shares, the nearest to `config` first, without itself.

    A step away doubles or halves `tensor`, has another `fsdp`, doubles accumulation, or is the next remat; `data` takes
    the devices that are left.

    Args:
      config: the run.
      devices: of all slices.
      shrink: how many times smaller the memory has to get. As more accumulation, `tensor` or `fsdp` divides it at most,
        what is too near is left out, and above 1 also what keeps more for the backward pass.
    """
    own, kept = _sizes(config.mesh, devices), REMATS.index(config.model.remat)
    fsdp, tensor = (own["fsdp"], own["tensor"]) if own else (config.mesh.fsdp, max(config.mesh.tensor, 1))
    remats = REMATS[kept:] if shrink > 1 else REMATS
    found = {}
    for split, shards, remat, factor in itertools.product({*_FACTORS, tensor}, (fsdp, *_FSDP), remats, _FACTORS):
        data = 1 if shards == -1 else -1
        mesh = MeshConfig(data=data, fsdp=shards, tensor=split, sequence=config.mesh.sequence)
        sizes = _sizes(mesh, devices)
        if sizes is None or (sizes, remat, factor) == (own, config.model.remat, 1):
            continue
        smaller = factor * max(split / tensor, 1) * max(sizes["fsdp"] / max(fsdp, 1), 1)
        candidate = _changed(config, sizes, mesh, remat, factor)
        if candidate is None or (remat == config.model.remat and smaller < shrink):
            continue
        steps = abs(math.log2(split / tensor)) + (sizes["fsdp"] != fsdp)
        steps += abs(REMATS.index(remat) - kept) + math.log2(factor)
        # The same sizes may come twice, by -1 and by their number.
        found.setdefault((*sizes.values(), remat, factor), ((steps, factor, split), candidate))
    return [candidate for _, candidate in sorted(found.values(), key=lambda each: each[0])]


def _sizes(mesh: MeshConfig, devices: int) -> dict[str, int] | None:
    """Returns the size of each axis, None if the mesh doesn't fit the devices."""
    try:
        return config_mesh.sizes(mesh, devices)
    except ConfigError:
        return None


def _changed(
    config: ExperimentConfig, sizes: dict[str, int], mesh: MeshConfig, remat: str, factor: int
) -> ExperimentConfig | None:
    """Returns the config with these settings, None if a mesh of these sizes can't hold it in equal shares."""
    try:
        changed = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, accumulation=config.train.accumulation * factor),
            mesh=mesh,
        )
        config_mesh.check(sizes, changed)
    except ConfigError:
        return None
    return changed


def until_it_fits(
    configs: Iterable[ExperimentConfig], tries: int, examine: Callable[[ExperimentConfig], Report]
) -> Tried:
    """Compiles one config after the other, `tries` at most, and stops at the first that fits."""
    reports = []
    for config in itertools.islice(configs, tries):
        reports.append(examine(config))
        if reports[-1].fits:
            break
    return Tried(reports)


def all_of(configs: Iterable[ExperimentConfig], tries: int, examine: Callable[[ExperimentConfig], Report]) -> Tried:
    """Compiles the first `tries` configs."""
    return Tried([examine(config) for config in itertools.islice(configs, tries)])
