"""The longer run on a CPU: the demo's model, twice the batch, and more documents to tell apart: d = 1, 4, then 16."""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: at the last d a query sees up to 3,072 tokens of 16 documents, 192 of them its own."""
    config = demo.get_config()
    config.data.batch_size = 64
    config.crossbatch.d = (1, 4, 16)
    config.crossbatch.d_steps = (1100, 1500)
    config.train.steps = 2000
    config.evaluate.memory = (0, 256, 1024, 4096, 16384)
    config.evaluate.readers = ("dense", "knn")
    config.evaluate.modes = ("single_doc", "multi_doc")
    config.evaluate.max_tokens = 0
    return config
