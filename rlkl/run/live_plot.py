"""The figure of a run, drawn again and again in a notebook while it trains."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rlkl.errors import UserError
from rlkl.run import report


def require_notebook() -> None:
    """UserError where this is no notebook, or matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
        from IPython import get_ipython
    except ImportError as error:
        raise UserError(
            f"log.plot=true needs {error.name}: pip install 'rlkl[notebook]', or set log.plot=false"
        ) from error
    if getattr(get_ipython(), "kernel", None) is None:  # IPython in a terminal has none
        raise UserError("log.plot=true draws in a notebook, and this is none: set log.plot=false")


class LivePlot:
    """A figure in the output of a notebook's cell."""

    def __init__(self) -> None:
        self.shown: Any = None

    def show(self, rows: Sequence[dict], before: Mapping[str, float]) -> None:
        """Draw the rows so far in place of the figure that was shown before."""
        from IPython.display import Image, display

        figure = report.draw(rows, before)
        if figure is None:
            return
        png = io.BytesIO()
        figure.savefig(png, dpi=80)
        image = Image(png.getvalue())
        if self.shown is None:
            self.shown = display(image, display_id=True)
        else:
            self.shown.update(image)
