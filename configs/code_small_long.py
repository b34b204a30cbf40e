"""The second stage of the longer run: `code_small`, fine-tuned on packs of 64 contexts."""

import ml_collections

from configs import code_small


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: a query sees up to 4,032 tokens of its own document, and as many of another."""
    config = code_small.get_config()
    config.train.init_from = "runs/code_small"
    config.train.steps = 300
    config.data.batch_size = 128
    config.crossbatch.packing = 64
    config.crossbatch.w = 63
    config.crossbatch.d = (2,)
    config.crossbatch.d_schedule = "constant"
    config.crossbatch.d_steps = ()
    config.optimizer.learning_rate = 1e-3
    return config
