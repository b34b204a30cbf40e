"""The whole path in under a minute on a CPU: 4 layers of width 64 on Python's standard library."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.dim = 64
    config.model.heads = config.model.kv_heads = 4
    config.model.head_dim = 16
    config.model.mlp_dim = 256
    config.model.attention_block = 64
    config.crossbatch.d = (1, 2)
    config.crossbatch.d_schedule = "steps"
    config.crossbatch.d_steps = (40,)
    config.data.context = 64
    config.optimizer.warmup_steps = 10
    config.train.steps = 60
    config.train.log_every = 5
    config.train.evaluate_every = 30
    config.train.evaluate_batches = 2
    config.train.checkpoint_every = 30
    config.evaluate.memory = (0, 64, 256)
    config.evaluate.neighbours = 32
    config.evaluate.block = 128
    config.evaluate.max_documents = 8
    config.evaluate.max_tokens = 1024
    config.evaluate.position_bins = (64, 256, 1024)
    return config
