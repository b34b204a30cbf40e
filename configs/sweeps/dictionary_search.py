"""An adaptive search of dictionary lookup, poor trials ended early."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns learning rate and warm-up, 30 trials of at most 1000 steps."""
    return space.Sweep(
        base="configs/dictionary_tiny.py",
        space=space.Adaptive(
            {
                "optimizer.learning_rate": space.LogReal(3e-4, 1e-2),
                "optimizer.warmup_steps": space.Integer(0, 200, step=50),
                "model.memory_layers": space.Choice(((1,), (2,), (3,))),
            },
            trials=30,
        ),
        pruner=space.Median(trials=5, steps=300),
    )
