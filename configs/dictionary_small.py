"""Dictionary lookup by the longer run on a CPU: heads of 64, and three times the steps (FoT, Appendix D)."""

import ml_collections

from configs import dictionary_tiny


def get_config() -> ml_collections.ConfigDict:
    """Returns the run; two key/value heads of 64 make 16M tokens 8 GiB of keys and values in float16."""
    config = dictionary_tiny.get_config()
    config.model.kv_heads = 2
    config.model.head_dim = 64
    config.train.steps = 3000
    config.evaluate.memory = (16_384, 262_144, 1_048_576, 4_194_304, 16_777_216)
    config.evaluate.memory_dtype = "float16"
    return config
