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


def candidates(config: ExperimentConfig, devices: list[jax.Device]) -> list[ExperimentConfig]:
    """Returns configs that the devices can hold in equal shares, the nearest to `config` first, without itself.

    Accumulation and remat make room; a mesh with more `tensor` or `data` only lets them divide, so it varies last.
    """
    found = []
    remats = REMATS[REMATS.index(config.model.remat) :]
    for remat, factor, tensor, data in itertools.product(remats, _FACTORS, _FACTORS, _FACTORS):
        mesh = MeshConfig(data=data, fsdp=-1, tensor=tensor, sequence=config.mesh.sequence)
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
        distance = math.log2(factor) + remats.index(remat), math.log2(tensor * data), data
        found.append((distance, candidate))
    own = dict(sharding.make_mesh(config.mesh, devices).shape) if _divides(config, devices) else {}
    return [
        candidate
        for _, candidate in sorted(found, key=lambda pair: pair[0])
        if (candidate.model, candidate.train) != (config.model, config.train)
        or dict(sharding.make_mesh(candidate.mesh, devices).shape) != own
    ]


def _divides(config: ExperimentConfig, devices: list[jax.Device]) -> bool:
    try:
        sharding.make_mesh(config.mesh, devices)
    except ConfigError:
        return False
    return True


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
