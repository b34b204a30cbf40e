"""Devices of a pod that isn't there, for the compiler to compile for."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from fot.config.accelerators import alike, check
from fot.errors import UserError

_CHIP = {"v4": {"chip_config_name": "megacore"}}  # its two cores are one device
# libtpu asks a cloud's metadata where it runs unless it is told; and two processes may compile at once.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of so many slices of a topology: to compile for, not to run on.

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
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **chip, **({"num_slices": slices} if slices > 1 else {})
        )
    except jax.errors.JaxRuntimeError as error:
        message = str(error).partition(": ")[2] or str(error)
        raise UserError(f"topology {topology!r}: {message}; try {alike(topology)!r}") from None
    return list(described.devices)
