"""How many previous contexts of a document a memory layer sees: w of the 184M model, with the same tokens of loss."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns w from 1 to 3 in packs that hold as many contexts: 64 packs, 32k tokens of C_curr, each."""
    return space.Sweep(
        base="configs/184m.py",
        space=space.Zip(
            {
                "crossbatch.w": (1, 2, 3),
                "crossbatch.packing": (2, 3, 4),
                "data.batch_size": (128, 192, 256),
                "data.min_document_tokens": ((1024,), (1536,), (2048,)),
            }
        ),
        fixed={"crossbatch.d": (2,), "crossbatch.d_schedule": "constant"},
    )
