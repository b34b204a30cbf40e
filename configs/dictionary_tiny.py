"""`make dictionary`: dictionary lookup by 4 layers of width 128 on a CPU (FoT, Appendix D)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: documents of 6 definitions and 6 questions; once it looks up, the definitions of 63 others too.

    Short documents teach lookup in minutes where long ones don't. What makes it last in a large memory are negatives
    that are hard to tell apart, half of the keys differing in one token from keys of 31 other documents, and logits
    that grow with the logarithm of the keys in memory, beyond those that training shows.
    """
    config = base.get_config()
    base.dictionary(config)
    config.model.unroll = 4
    config.model.attention_block = 64
    config.model.logn_keys = 4096  # 64 documents' definitions
    config.data.context = 64
    config.data.batch_size = 128  # 64 documents
    config.dictionary.window = 64
    config.dictionary.document = 128
    config.dictionary.confusable = 0.5
    config.crossbatch.d = (1, 64)
    config.optimizer.learning_rate = 2e-3
    config.train.steps = 1000
    config.train.evaluate_every = 100
    config.evaluate.memory = (256, 4096, 16_384, 65_536, 262_144, 1_048_576)
    return config
