"""How many documents a memory layer sees: d of the 184M model, from none besides its own to the whole batch of 32k."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns d from 1 to 64."""
    return space.Sweep(
        base="configs/184m.py",
        space=space.Grid({"crossbatch.d": ((1,), (2,), (4,), (8,), (16,), (32,), (64,))}),
        fixed={"crossbatch.d_schedule": "constant"},
    )
