"""The paper's table of (w, d) on arXiv: previous contexts of the own document, and documents, of the 184M model."""

from launch import space


def get_sweep() -> space.Sweep:
    """Returns (1, 1), (1, 2), (2, 1) and (2, 2), with the same tokens of loss, as `paper_w.py`."""
    contexts = space.Zip(
        {
            "crossbatch.w": (1, 2),
            "crossbatch.packing": (2, 3),
            "data.batch_size": (128, 192),
            "data.min_document_tokens": ((1024,), (1536,)),
        }
    )
    return space.Sweep(
        base="configs/184m.py",
        space=space.Product((contexts, space.Grid({"crossbatch.d": ((1,), (2,))}))),
        fixed={"crossbatch.d_schedule": "constant"},
    )
