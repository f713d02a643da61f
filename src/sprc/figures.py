"""Figures as files: matplotlib without a screen."""

from pathlib import Path

import matplotlib

from sprc.run_folder import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write the figure as PNG, atomically, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
