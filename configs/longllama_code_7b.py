"""LongLLaMA-Code 7B, from Code Llama 7B: 35B tokens of context 4096.

The batch and the segments of this model are not published: 256k tokens and the segments of LongLLaMA 7B stand in.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.longllama()
    config.model.vocab_size = 32_016
    config.model.layers = 32
    config.model.memory_layers = (8, 16, 24)
    config.model.dim = 4096
    config.model.heads = config.model.kv_heads = 32
    config.model.head_dim = 128
    config.model.mlp_dim = 11008
    config.model.rope_theta = 1e6
    config.model.norm_epsilon = 1e-5
    config.crossbatch.segments = ((0, 0), (1, 2), (2, 5), (3, 4))
    config.data.context = 4096
    config.data.batch_size = 64
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 16, 2
    config.train.steps = 133_515  # 35B tokens
    config.evaluate.memory = (0, 4096, 12288, 28672, 65536)
    return config
