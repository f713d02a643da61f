"""Pictures that people send, thumbnails, and a sheet of results."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sprc.data.images import own_formats, strict_pillow
from sprc.data.transforms import to_eight_bits, upright
from sprc.errors import InputError
from sprc.search.index import Result, printable

COLUMNS = 6  # of a sheet


def read_picture(data: bytes, most_pixels: int) -> Image.Image:
    """Decode a picture that somebody sent; nothing is decoded before its size is known.

    Raises :class:`InputError`, which does not name it, if it is no picture, broken, or larger than
    ``most_pixels``.
    """
    try:
        with strict_pillow():
            image = Image.open(io.BytesIO(data), formats=own_formats())
            width, height = image.size
            if width * height > most_pixels:
                raise InputError(
                    f"the picture has {width} x {height} pixels; the most is {most_pixels // 10**6} million"
                )
            image.load()
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"the picture is too large; the most is {most_pixels // 10**6} million pixels"
        ) from error
    except Exception as error:  # broken bytes come out of Pillow's decoders as almost any exception
        raise InputError(
            "the file is no picture that can be read: it is broken, or of another format than "
            f"{', '.join(own_formats())}"
        ) from error
    return image


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy at most ``side`` pixels wide and high, upright, in RGB."""
    image.draft("RGB", (2 * side, 2 * side))  # of a JPEG that is not decoded yet, only the detail needed
    small = upright(to_eight_bits(image))
    small.thumbnail((side, side))
    return small.convert("RGB")


def open_thumbnail(path: Path, side: int) -> Image.Image:
    """The picture at ``path``, small; raises :class:`InputError` if it is gone or broken by now."""
    try:
        with strict_pillow(), Image.open(path, formats=own_formats()) as image:
            return thumbnail(image, side)
    except Exception as error:
        raise InputError(f"{printable(path)} cannot be read any more; run `search.py index` again") from error


def as_bytes(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def on_square(image: Image.Image, side: int) -> Image.Image:
    """The picture as large as fits on a light square, so that those of a grid stand in line."""
    return ImageOps.pad(image, (side, side), color="#eeeeee")


def draw_results(
    path: Path, reference: Image.Image, text: str, results: list[tuple[Result, Image.Image]]
) -> None:
    """Write a PNG: the reference, the text, and the results with their scores and names, best first."""
    # Here, because a search without a sheet need not import matplotlib.
    from sprc.figures import Cell, draw_cell, make_grid, save_figure

    cells = [("reference", "", reference)]
    cells += [
        (f"{place}: {result.scores}", result.name, image)
        for place, (result, image) in enumerate(results, start=1)
    ]
    wide = min(len(cells), COLUMNS)
    high = -(-len(cells) // wide)
    left = 0.1
    figure, axes = make_grid(high, wide, side=1.5, gaps=(0.15, 0.5), margins=(left, left, 0.35, 0.6))
    width, height = figure.get_size_inches()
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    for (title, name, image), axis in zip(cells, axes.flat, strict=False):
        draw_cell(axis, Cell(title, name), np.asarray(image))
        axis.set_anchor("N")
        shown = printable(name)
        shown = shown if len(shown) <= 26 else f"...{shown[-23:]}"
        # Names and captions are the users' words: never read them as math markup.
        axis.text(0, -0.04, shown, fontsize=6, va="top", parse_math=False, transform=axis.transAxes)
    words = " ".join(text.split())
    most = 14 * wide
    words = words if len(words) <= most else words[: most - 4] + " ..."
    figure.text(left / width, 1 - 0.08 / height, words, fontsize=10, va="top", parse_math=False)
    save_figure(figure, path)
