"""What the page shows of a picture: small, or under a map of the edit; and of a text, as much as fits."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from sprc.data.transforms import denormalise
from sprc.figures import FIXED, colored, own_scale, scale_from_zero
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.fusion_maps import fusion_maps, word_maps
from sprc.search.pictures import as_bytes, on_square, open_thumbnail

SIDE = 224  # of the reference
SMALL = 150  # of a result
WITHOUT, READS = "change if it is left out", "attention to it"  # kinds of maps of words


class Map(NamedTuple):
    """Where the fusion edits the reference."""

    values: Tensor  # (P, P)
    scale: tuple[float, float]


def edit_maps(
    model: Blip2QformerCirAlignPrompt, tokens: Tensor, text: str, strength: float
) -> dict[str, Map]:
    """The maps of the edit that a text makes of (1, N, D) tokens, by a model with fusion."""
    gate, changes = fusion_maps(model, tokens, [text])
    assert changes is not None  # there is a fusion
    change = strength * changes[0]
    maps = {"change, own scale": Map(change, own_scale(change))}
    if gate is not None:
        maps = {
            "gate, own scale": Map(gate[0], own_scale(gate[0])),
            "gate, 0 to 1": Map(gate[0], FIXED),
            **maps,
        }
    return maps


def maps_of_words(
    model: Blip2QformerCirAlignPrompt, tokens: Tensor, text: str, strength: float, kind: str
) -> tuple[list[tuple[str, Map]], float]:
    """The text's words and their maps, on one scale; and the share of the change that is no word's.

    Args:
        model: one that :func:`word_maps` takes, of the strategy `cross` for ``READS``.
        tokens: (1, N, D), of the reference.
        text: with a word.
        strength: of the edit.
        kind: ``WITHOUT`` or ``READS``.
    """
    words, maps, attention = word_maps(model, tokens, text)
    rest = 0.0
    if kind == READS:
        assert attention is not None  # it is `cross`
        maps = attention[:-1]
        rest = (attention[-1].sum() / attention.sum().clamp(min=1e-12)).item()
    maps = strength * maps
    scale = scale_from_zero(maps)
    return [(word, Map(one, scale)) for word, one in zip(words, maps, strict=True)], rest


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
