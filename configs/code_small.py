"""The longer run on a CPU: the demo's model, packs of 16 contexts, and more and more documents to tell apart."""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: at the last d a query sees up to 7,680 tokens of 8 documents, 960 of them its own."""
    config = demo.get_config()
    config.data.batch_size = 128
    config.crossbatch.packing = 16
    config.crossbatch.w = 15
    config.crossbatch.d = (1, 2, 4, 8)
    config.crossbatch.d_steps = (1500, 1800, 2100)
    config.train.steps = 2500
    config.evaluate.memory = (0, 256, 1024, 4096, 16384)
    config.evaluate.readers = ("dense", "knn")
    config.evaluate.modes = ("single_doc", "multi_doc")
    config.evaluate.max_tokens = 0
    return config
