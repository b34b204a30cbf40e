"""FoT 600M: 16 heads of 128 on a width of 2048 (FoT, section 4)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.paper_large()
    config.model.heads = config.model.kv_heads = 16
    config.model.mlp_dim = 8192
    config.train.steps = 150_000
    return config
