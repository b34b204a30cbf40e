"""The models of the paper's figure of distraction (FoT, section 3.3), for a CPU: d = 1, 2, 8, 64 and a plain one.

for d in 1 2 8 64; do
  python -m fot.train --config=configs/distraction.py --workdir=runs/distraction/d$d --config.crossbatch.d=1,$d
done
python -m fot.train --config=configs/distraction.py --workdir=runs/distraction/plain --config.crossbatch.variant=none
python -m fot.evaluate distraction --workdir=runs/distraction/d1 \
  --against=runs/distraction/d2,runs/distraction/d8,runs/distraction/d64,runs/distraction/plain
"""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's model with pairs of contexts: memory is learnt with d = 1, then held against d documents."""
    config = demo.get_config()
    config.data.batch_size = 128  # 64 pairs: as many documents as d = 64 wants
    config.crossbatch.packing = 2
    config.crossbatch.w = 1
    config.crossbatch.d = (1, 64)
    config.crossbatch.d_steps = (400,)
    config.train.steps = 600
    return config
