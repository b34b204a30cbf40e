"""Dictionary lookup as in the paper, for a TPU: 37M parameters, 16M tokens of memory (FoT, Appendix D)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the run; 16M tokens are 32 GiB of keys and values."""
    config = base.paper_37m()
    base.dictionary(config)
    config.evaluate.memory = (16_384, 262_144, 1_048_576, 4_194_304, 16_777_216)
    return config
