"""FoT 37M, dictionary lookup: vocabulary 64, context 256, d from 1 to 128 at 98% accuracy (FoT, Appendix D).

A batch is 128 documents of 512 tokens (64k): definitions in the first row, C_prev, and queries in the second.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.paper()
    config.model.vocab_size = 64
    config.model.dim = 512
    config.model.heads = config.model.kv_heads = 8
    config.model.head_dim = 64
    config.model.mlp_dim = 2048
    config.crossbatch.d = (1, 128)
    config.crossbatch.d_schedule = "accuracy"
    config.crossbatch.d_accuracy = 0.98
    config.data.context = 256
    config.data.batch_size = 256
    config.data.min_document_tokens = (512,)
    config.optimizer.learning_rate = 0.02
    config.optimizer.min_learning_rate = 0.01
    config.train.steps = 5_000
    config.train.evaluate_every = 200
    config.train.checkpoint_every = 500
    config.train.keep_every = 0
    config.evaluate.neighbours = 32
    config.evaluate.memory = (0, 256, 4096, 16384, 65536)
    return config
