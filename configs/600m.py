"""FoT 600M: vocabulary of 64k, context 2048, d = 2 (FoT, section 4)."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.paper()
    config.model.vocab_size = 64_000
    config.model.dim = 2048
    config.model.heads = config.model.kv_heads = 16
    config.model.head_dim = 128
    config.model.mlp_dim = 8192
    config.model.remat = "dots"
    config.model.attention_block = 512
    config.crossbatch.d = (2,)
    config.data.context = 2048
    config.data.batch_size = 256  # 256k tokens of C_curr
    config.data.min_document_tokens = 4096
    config.optimizer.learning_rate = 5e-3
    config.optimizer.min_learning_rate = 5e-4
    config.train.steps = 150_000
    config.evaluate.memory = (0, 2048, 4096, 16384, 65536)
    return config
