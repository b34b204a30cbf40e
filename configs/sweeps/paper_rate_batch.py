"""The paper's grid of learning rate and batch, for its 184M model; name documents by overrides."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns learning rate × batch: 8k, 16k and 32k tokens of C_curr, two rows of 512 tokens each a pack."""
    return space.Sweep(
        base="configs/184m.py",
        space=space.Grid(
            {
                "optimizer.learning_rate": (1e-2, 5e-3, 3e-3, 1e-3),
                "data.batch_size": (32, 64, 128),
            }
        ),
        fixed={"crossbatch.d": (2,), "crossbatch.d_schedule": "constant"},
    )
