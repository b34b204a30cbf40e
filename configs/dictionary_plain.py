"""The plain transformer beside configs/dictionary_tiny.py: a document in one row, every layer local, no crossbatch."""

import ml_collections

from configs import dictionary_tiny


def get_config() -> ml_collections.ConfigDict:
    config = dictionary_tiny.get_config()
    config.model.memory_layers = ()
    config.crossbatch.variant = "none"
    config.crossbatch.packing = 1
    config.crossbatch.d = (1,)
    config.crossbatch.d_schedule = "constant"
    config.data.context = config.dictionary.document
    config.data.batch_size = 64
    return config
