"""The longer run on a CPU: the demo's model, in packs of 64 contexts, so that it meets what it will meet in a memory."""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: a query sees up to 4,032 tokens of its own document, and at the last d as many of another."""
    config = demo.get_config()
    config.data.batch_size = 128
    config.crossbatch.packing = 64
    config.crossbatch.w = 63
    config.crossbatch.d = (1, 2)
    config.crossbatch.d_steps = (500,)
    config.train.steps = 1200
    config.evaluate.memory = (0, 256, 1024, 4096, 16384)
    config.evaluate.readers = ("dense", "knn")
    config.evaluate.modes = ("single_doc", "multi_doc")
    config.evaluate.max_tokens = 0
    return config
