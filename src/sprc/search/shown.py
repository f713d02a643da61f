"""What the page shows of a picture: small, or under a map of the edit; and of a text, as much as fits."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from sprc.data.transforms import denormalise
from sprc.figures import colored
from sprc.search.pictures import as_bytes, on_square, open_thumbnail

SIDE = 224  # of the reference
SMALL = 150  # of a result


class Map(NamedTuple):
    """Where the fusion edits the reference."""

    values: Tensor  # (P, P)
    scale: tuple[float, float]


@lru_cache(maxsize=4096)
def small_bytes(path: Path, _digest: str) -> bytes:
    """A small picture, as a file of bytes; one that changes and is indexed again has another digest."""
    return as_bytes(on_square(open_thumbnail(path, SMALL), SMALL))


def draw_map(pixels: Tensor, shown: Map | None, opacity: float) -> bytes:
    """The reference as the model sees it, (3, S, S), perhaps under a map."""
    seen = (denormalise(pixels).permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(seen).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if shown is not None:
        colors = Image.fromarray(colored(*shown)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        image = Image.blend(image, colors, opacity)
    return as_bytes(image, "PNG")


def shortened(text: str, most: int, *, end: bool = False) -> str:
    """One line of at most ``most`` letters, the first ones, or with ``end`` the last."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return f"...{text[3 - most :]}" if end else f"{text[: most - 3]}..."
