"""What all pictures share: colours, a figure that notebooks show by themselves, saving.

Every function of `jmlp.plots` returns its figure, drawn without pyplot: nothing is shown
or kept by itself. Colours are Okabe and Ito's, which colour-blind people tell apart
(https://jfly.uni-koeln.de/color/); where there are more lines than colours, dashes differ.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from jmlp.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

try:
    from matplotlib.figure import Figure as _Figure
except ImportError:
    raise ConfigError("pictures need matplotlib: pip install 'jmlp[plots]'") from None
except ValueError as error:  # of a backend in the environment, though none is used here
    raise ConfigError(f"matplotlib does not start: {error}. Unset MPLBACKEND") from None

BLUE, VERMILION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
SKY, PURPLE, GREY = "#56b4e9", "#cc79a7", "#8c8c8c"
REST = "#bbbbbb"  # what something is compared with
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)
DASHES = ("-", "--", ":")
SPLITS = {"train": BLUE, "val": VERMILION, "test": GREEN}
FORMATS = (".png", ".pdf", ".svg")
DOTS_PER_INCH = 110  # 9 inches are as wide as a notebook, and letters as large as its text's


class Figure(_Figure):
    """A matplotlib figure that a notebook shows where a cell ends with it."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()


def new(
    columns: int = 1, rows: int = 1, *, width: float = 9.0, height: float = 3.4, **options: Any
) -> "tuple[Figure, np.ndarray]":
    """A figure of `width` x `height` inches, and its axes as an array (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def tidy(axes: "Axes", grid: Literal["both", "x", "y"] = "both") -> None:
    """Fewer lines: no box, and a grid that stays behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, alpha=0.3)


class Look(TypedDict):
    """How a line is told from others."""

    color: str
    linestyle: str


def look(number: int) -> Look:
    """Colour and dashes of line `number`; no two of the first 21 look alike."""
    return {
        "color": CYCLE[number % len(CYCLE)],
        "linestyle": DASHES[number // len(CYCLE) % len(DASHES)],
    }


def legend(axes: "Axes", **options: Any) -> None:
    """A legend, if anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"frameon": False} | options)


def check(file: Path) -> None:
    """Refuses, before any work, a picture that cannot be written.

    Raises:
      ConfigError: an unknown ending, or a folder that is not there.
    """
    if file.suffix not in FORMATS:
        raise ConfigError(f"--plot {file}: expected a name ending in {', '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--plot {file}: folder {file.parent} does not exist")


def save(figure: _Figure, file: Path | str) -> None:
    """Writes `figure` to `file`: the old picture or the new one, never a part.

    Raises:
      ConfigError: as `check`, or the file cannot be written.
    """
    file = Path(file)
    check(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format=file.suffix[1:])
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"--plot {file}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def counted(values: Sequence[object], most: int, word: str) -> str:
    """`a, b, c and 4 more WORD`: the first of a long list."""
    some = ", ".join(map(str, values[:most]))
    return some if len(values) <= most else f"{some} and {len(values) - most} more {word}"


def plain(text: object) -> str:
    """A name as matplotlib shows it as it is: between two dollars it would set a formula."""
    return str(text).replace("$", r"\$")


def bytes_text(count: float) -> str:
    """`1.7 MB`, in powers of 1000."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
