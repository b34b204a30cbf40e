"""FoT 1.2B: 32 heads of 128 on a width of 2048 (FoT, section 4)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.paper_large()
    config.model.heads = config.model.kv_heads = 32
    config.model.mlp_dim = 16384
    config.train.steps = 200_000
    return config
