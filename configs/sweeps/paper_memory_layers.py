"""Which layers of the 184M model, of 12, are memory layers; the paper's is layer 8."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns single layers from the middle to the top, and several."""
    return space.Sweep(
        base="configs/184m.py",
        space=space.Grid({"model.memory_layers": ((4,), (6,), (8,), (10,), (4, 8), (6, 8, 10))}),
        fixed={"crossbatch.d": (2,), "crossbatch.d_schedule": "constant"},
    )
