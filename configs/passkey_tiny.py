"""`make passkey`: passkey retrieval by 4 layers of width 64 on a CPU, from 256 tokens to tens of thousands."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the run: texts of at most 256 tokens in 4 rows, the question in the last.

    A memory holds filler and one key, so what makes it last is that filler never comes near: in the end a question
    also sees 7 documents that are filler alone. Other keys must not be there: nothing tells whose they are.
    """
    config = base.get_config()
    base.passkey(config)
    config.model.dim = 64
    config.model.mlp_dim = 256
    config.model.unroll = 4
    config.model.attention_block = 64
    config.data.context = 64
    config.data.batch_size = 128  # 32 documents
    config.crossbatch.packing = 4
    config.crossbatch.w = 3
    config.crossbatch.d = (1, 8)
    config.crossbatch.d_schedule = "steps"
    config.crossbatch.d_steps = (700,)
    config.passkey.document = 256
    config.passkey.tokens = (128, 256, 256)
    config.passkey.documents_per_key = (1, 1, 8)
    config.passkey.phase_steps = (200, 700)
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 900
    config.train.evaluate_every = 100
    config.evaluate.batch_size = 5
    config.evaluate.trials = 20
    config.evaluate.lengths = (256, 1024, 4096, 16_384, 65_536)
    return config
