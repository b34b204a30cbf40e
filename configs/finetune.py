"""Fine-tunes any imported model into a Focused Transformer, by the recipe of LongLLaMA (FoT, section 5).

  python -m fot.convert --from=hf --source=open_llama_3b --to=fot --target=runs/imported
  python -m fot.train --config=configs/finetune.py --workdir=runs/tuned --config.train.init_from=runs/imported \
      --config.model.memory_layers=6,12,18 --config.data.files=documents/**/*.txt

What this file leaves out, the model's shape, its tokenizer and its context, is what the checkpoint of `train.init_from`
was stored with. A model as small as SmolLM2-135M trains on a CPU with `--config.model.compute_dtype=float32
--config.data.context=256 --config.data.batch_size=8 --config.crossbatch.packing=2
--config.crossbatch.segments="((0,0),(1,1))"`.
"""

import ml_collections

from configs import base
from fot.config import INDIFFERENT

# Fields of the model that the stored weights leave open; all others come with the checkpoint.
OPEN = ("compute_dtype", *INDIFFERENT)
FROM_CHECKPOINT = ("context", "tokenizer", "tokenizer_file")


def get_config() -> ml_collections.ConfigDict:
    config = base.longllama()
    config.unlock()
    for name in set(config.model) - set(OPEN):
        del config.model[name]
    for name in FROM_CHECKPOINT:
        del config.data[name]
    config.crossbatch.segments = ((0, 0), (1, 1), (2, 1), (3, 0))
    config.train.steps = 1000
    return config.lock()
