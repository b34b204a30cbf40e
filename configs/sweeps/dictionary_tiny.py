"""A sweep to try the command with: 12 short trials of dictionary lookup, minutes on a CPU; too short to learn it."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns learning rate × memory layer, 40 steps of 8 documents each."""
    return space.Sweep(
        base="configs/dictionary_tiny.py",
        space=space.Grid(
            {
                "optimizer.learning_rate": (1e-2, 5e-3, 3e-3, 1e-3),
                "model.memory_layers": ((1,), (2,), (3,)),
            }
        ),
        fixed={
            "data.batch_size": 16,
            "crossbatch.d": (1, 8),
            "train.steps": 40,
            "train.log_every": 10,
            "train.evaluate_every": 10,
            "train.evaluate_batches": 2,
            "train.checkpoint_every": 10,
            "optimizer.warmup_steps": 5,
        },
    )
