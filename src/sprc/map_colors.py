"""Maps over images: their scales and colors. The page of a search needs these alone, and no figures."""

import numpy as np
from matplotlib import colormaps
from torch import Tensor

FIXED = (0.0, 1.0)  # the scale on which maps of different images and models compare
COLORS = "viridis"
OPACITY = 0.75  # of a map over its image


def own_scale(values: Tensor) -> tuple[float, float]:
    """The least and the largest value. Where all are equal but for rounding, 1 % to both sides."""
    low, high = values.min().item(), values.max().item()
    if high - low <= 1e-5 * abs(high):
        low, high = low - 0.01 * abs(low), high + 0.01 * abs(high)
    return (low, high) if high > low else (low, low + 1.0)


def scale_from_zero(values: Tensor) -> tuple[float, float]:
    """From 0 to the largest value of maps that are 0 or more; to 1 where there is none above 0."""
    most = values.max().item() if values.numel() else 0.0
    return 0.0, most or 1.0


def colored(values: Tensor, scale: tuple[float, float]) -> np.ndarray:
    """A (P, P) map as (P, P, 3) uint8 colors."""
    low, high = scale
    scaled = ((values - low) / (high - low)).clamp(0, 1).numpy()
    return colormaps[COLORS](scaled, bytes=True)[..., :3]
