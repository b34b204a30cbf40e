"""`make dictionary`: dictionary lookup by 4 layers of width 128 on a CPU (FoT, Appendix D)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: few records first, then as many as fit, then the definitions of other documents beside them."""
    config = base.get_config()
    base.dictionary(config)
    config.model.unroll = 4
    config.data.batch_size = 64  # 32 documents
    config.dictionary.records = (6, 0)
    config.dictionary.records_steps = (400,)
    config.crossbatch.d = (1, 16)
    config.crossbatch.d_after = 400
    config.optimizer.learning_rate = 2e-3
    config.train.steps = 1000
    config.train.evaluate_every = 100
    config.evaluate.memory = (256, 4096, 16_384, 65_536, 262_144, 1_048_576)
    return config
