"""What kind of devices there are, and whether they run the kernels."""

import functools
import logging

import jax

_TOO_OLD = ("TPU v2", "TPU v3")  # Mosaic has no bfloat16 products for them

_log = logging.getLogger(__name__)


def runs_kernels(choice: str) -> bool:
    """Tells whether kernels run where `model.attention_kernel` is `choice`.

    "jnp" says never; "auto" on TPUs; "pallas" also elsewhere, interpreted. Where the devices are TPUs that can't, that
    is logged once.
    """
    if choice == "jnp":
        return False
    kind = _device()[1]
    if kind.startswith(_TOO_OLD):
        _tell(kind)
        return False
    return choice == "pallas" or platform() == "tpu"


def interprets() -> bool:
    """Tells whether kernels, if they run, are interpreted."""
    return platform() != "tpu"


def platform() -> str:
    """Returns the platform of the devices; of those to compile for, which need not be there."""
    return _device()[0]


@functools.cache
def _tell(kind: str) -> None:
    _log.warning("%s runs no attention kernels: attention takes its jnp forms (model.attention_kernel)", kind)


def _device() -> tuple[str, str]:
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind
