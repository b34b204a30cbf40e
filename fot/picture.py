"""The look of a picture, and writing it whole."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from fot import bucket, files

COLORS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#475569")


@contextlib.contextmanager
def drawing(path: str | pathlib.Path, width: float, height: float, remedy: str) -> Iterator[Any]:
    """Gives an empty matplotlib figure to draw on, and writes it as a PNG when the block ends.

    Args:
      path: of the file, replaced at once.
      width, height: inches.
      remedy: what the user can do if it can't be written.

    Raises:
      UserError: it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write(bucket.path(path), lambda file: file.write(buffer.getvalue()), remedy)


def tidy(axes: Any, legend: str = "best") -> None:
    """Gives matplotlib axes a faint grid, two spines, and a legend at that place, or with "" none."""
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9, loc=legend)
