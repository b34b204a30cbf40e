"""Text that several evaluations print."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Returns rows of cells as lines of aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [line.rstrip() for line in padded]
