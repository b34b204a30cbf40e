"""FoT 184M: T5 vocabulary of 32k, context 512, d = 2, then 64 for the last 50k of 500k steps (FoT, section 4).

For the fine-tuning of FoT, section 4.2: `--config.crossbatch.d=2,128 --config.crossbatch.d_schedule=random` with
`--config.data.batch_size=256`, since 128 documents have to be in a batch; on 4 chips of v4 also with
`--config.model.remat=elementwise`.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.paper()
    config.model.vocab_size = 32_000
    config.model.dim = 1024
    config.model.heads = config.model.kv_heads = 8
    config.model.head_dim = 128
    config.model.mlp_dim = 4096
    config.crossbatch.d = (2, 64)
    config.crossbatch.d_schedule = "steps"
    config.crossbatch.d_steps = (450_000,)
    config.data.context = 512
    config.data.batch_size = 128  # 32k tokens of C_curr
    config.data.min_document_tokens = (1024,)
    config.optimizer.learning_rate = 0.01
    config.optimizer.min_learning_rate = 5e-4
    config.train.steps = 500_000
    config.evaluate.memory = (0, 2048, 4096, 16384, 65536)
    return config
