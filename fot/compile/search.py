"""A small search for a mesh, remat and accumulation with which the train step fits."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from fot import sharding
from fot.compile.report import Report
from fot.config import ExperimentConfig, MeshConfig
from fot.config.model import REMATS
from fot.errors import ConfigError

_FACTORS = (1, 2, 4, 8)


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


def candidates(config: ExperimentConfig, devices: list[jax.Device], shrink: float) -> list[ExperimentConfig]:
    """Returns configs that the devices can hold in equal shares, the nearest to `config` first, without itself.

    A step away doubles accumulation or `tensor`, or is the next remat. `data` grows only if that is not enough to
    divide rows or widths.

    Args:
      config: the run.
      devices: of the topology.
      shrink: how many times smaller the memory has to get. As more accumulation or `tensor` divides it at most, what
        is too near is left out, and above 1 also what keeps more for the backward pass.
    """
    own, kept = _shape(config.mesh, devices), REMATS.index(config.model.remat)
    remats = REMATS[kept:] if shrink > 1 else REMATS
    found = []
    for data, remat, factor, split in itertools.product(_FACTORS, remats, _FACTORS, _FACTORS):
        tensor = split if own is None else split * own["tensor"]
        mesh = MeshConfig(data=data, fsdp=-1, tensor=tensor, sequence=config.mesh.sequence)
        steps = abs(REMATS.index(remat) - kept) + math.log2(factor * split)
        if remat == config.model.remat and factor * split < shrink:
            continue
        try:
            candidate = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, remat=remat),
                train=dataclasses.replace(config.train, accumulation=config.train.accumulation * factor),
                mesh=mesh,
            )
            sharding.check_mesh(sharding.make_mesh(mesh, devices), candidate)
        except ConfigError:
            continue
        if (remat, factor, _shape(mesh, devices)) != (config.model.remat, 1, own):
            found.append(((data, steps, tensor), candidate))
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def _shape(mesh: MeshConfig, devices: list[jax.Device]) -> dict[str, int] | None:
    """Returns the size of each axis, None if the mesh doesn't fit the devices."""
    try:
        return dict(sharding.make_mesh(mesh, devices).shape)
    except ConfigError:
        return None


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
