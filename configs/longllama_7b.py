"""LongLLaMA 7B, from OpenLLaMA 7B: 3B tokens, segments ¼(0,0) ¼(1,2) ¼(2,5) ¼(3,4) (FoT, section 5)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.longllama()
    config.model.layers = 32
    config.model.memory_layers = (8, 16, 24)
    config.model.dim = 4096
    config.model.heads = config.model.kv_heads = 32
    config.model.head_dim = 128
    config.model.mlp_dim = 11008
    config.crossbatch.segments = ((0, 0), (1, 2), (2, 5), (3, 4))
    config.mesh.data, config.mesh.fsdp = -1, 16
    config.train.steps = 11_444  # 3B tokens
    return config
