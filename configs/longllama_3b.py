"""LongLLaMA 3B, from OpenLLaMA 3B: 10B tokens, segments ¼(0,0) ¼(1,1) ¼(2,1) ¼(3,0) (FoT, section 5)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.longllama()
    config.model.layers = 26
    config.model.memory_layers = (6, 12, 18)
    config.model.dim = 3200
    config.model.heads = config.model.kv_heads = 32
    config.model.head_dim = 100
    config.model.mlp_dim = 8640
    config.crossbatch.segments = ((0, 0), (1, 1), (2, 1), (3, 0))
    config.mesh.data, config.mesh.fsdp = -1, 16
    config.train.steps = 38_147  # 10B tokens; 19_074 for the 5B of v1.1
    return config
