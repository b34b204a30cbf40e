"""`make demo`: 4 layers of width 128 with a local context of 64 tokens on Python's standard library."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: memory is learnt with d = 1 first, then held against other documents with d = 8."""
    config = base.get_config()
    config.model.attention_block = 64
    config.model.unroll = 4
    config.data.context = 64
    config.data.batch_size = 32
    config.crossbatch.packing = 4
    config.crossbatch.w = 3
    config.crossbatch.d = (1, 8)
    config.crossbatch.d_schedule = "steps"
    config.crossbatch.d_steps = (900,)
    config.train.steps = 1200
    config.evaluate.memory = (0, 256, 1024, 4096)
    config.evaluate.readers = ("dense",)
    config.evaluate.modes = ("single_doc",)
    config.evaluate.max_tokens = 8192
    return config
