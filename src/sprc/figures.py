"""Figures as files: matplotlib without a screen; the cell that a sheet of pictures is made of."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from torch import Tensor

from sprc.files import write_atomically
from sprc.map_colors import COLORS, FIXED, OPACITY

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

RIGHT, WRONG = "#2a9d4a", "#c0392b"


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write the figure as PNG, atomically, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)


def make_grid(
    high: int,
    wide: int,
    *,
    side: float,
    gaps: tuple[float, float],
    margins: tuple[float, float, float, float],
) -> tuple[Figure, np.ndarray]:
    """A figure and the axes (high, wide) of its squares. All in inches: a computed layout takes seconds.

    Args:
        high: rows.
        wide: columns.
        side: of a square.
        gaps: between columns, and between rows.
        margins: left, right, bottom, top.
    """
    across, between = gaps
    left, right, bottom, top = margins
    width = left + wide * side + (wide - 1) * across + right
    height = bottom + high * side + (high - 1) * between + top
    figure, axes = plt.subplots(high, wide, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=across / side,
        hspace=between / side,
    )
    return figure, axes


class Cell(NamedTuple):
    """One picture of a sheet or a page: an image, and perhaps a map over it."""

    title: str
    image: str  # its name
    values: Tensor | None = None  # (P, P)
    scale: tuple[float, float] = FIXED
    right: bool | None = None  # for a candidate: is it the target?


def draw_cell(axis: plt.Axes, cell: Cell, image: np.ndarray) -> None:
    """Draw the image, the map over it with its color bar, and the mark of a right or wrong candidate."""
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    axis.set_title(cell.title, fontsize=7, pad=3, parse_math=False)  # it may hold the users' words
    if cell.values is not None:
        low, high = cell.scale
        shown = axis.imshow(
            cell.values,
            cmap=COLORS,
            vmin=low,
            vmax=high,
            alpha=OPACITY,
            interpolation="nearest",
            extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5),
        )
        bar = axis.figure.colorbar(shown, cax=axis.inset_axes((1.03, 0, 0.06, 1)), ticks=[low, high])
        bar.ax.set_yticklabels([f"{low:.3g}", f"{high:.3g}"], fontsize=5.5)
        bar.ax.tick_params(length=0, pad=2)  # a tick would read as a minus
    if cell.right is not None:
        color, mark = (RIGHT, "✓ right") if cell.right else (WRONG, "✗ wrong")
        axis.set_title(f"{cell.title} {mark}", fontsize=7, pad=3, color=color)
        for spine in axis.spines.values():
            spine.set(color=color, linewidth=3)
