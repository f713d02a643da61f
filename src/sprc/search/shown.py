"""What the page shows of pictures (small, in a grid, under maps of the edit) and, shortened, of texts."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import streamlit as st
from PIL import Image
from torch import Tensor

from sprc.data.transforms import denormalise
from sprc.errors import InputError
from sprc.map_colors import FIXED, colored, own_scale, scale_from_zero
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.fusion_maps import fusion_maps, why_no_word_maps, word_maps
from sprc.search.index import PictureIndex, printable
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


def choose_words(model: Blip2QformerCirAlignPrompt) -> str | None:
    """Ask which maps of words to show, if any; say why where a model with fusion can have none."""
    if why := why_no_word_maps(model):
        st.caption(f"There is no map for each word: {why}.")
        return None
    kinds = [WITHOUT, READS] if model.config.fusion_strategy == "cross" else [WITHOUT]
    chosen = st.selectbox("A map for each word", ["none", *kinds], key="words")
    return None if chosen == "none" else chosen


def show_words(
    model: Blip2QformerCirAlignPrompt,
    tokens: Tensor,
    pixels: Tensor,
    text: str,
    strength: float,
    kind: str,
    opacity: float,
) -> None:
    """The reference, (1, N, D) and (3, S, S), under a map for each word of the text, on one scale."""
    words, maps, attention = word_maps(model, tokens, text)
    said = "How much the edit of a patch changes if the text lacks the word."
    if kind == READS:
        assert attention is not None  # it is `cross`
        maps = attention[:-1]
        rest = (attention[-1].sum() / attention.sum().clamp(min=1e-12)).item()
        said = (
            "The change of each patch, shared out by its attention to the words. "
            f"The marks of the text's start and end have {100 * rest:.0f} % of it."
        )
    maps = strength * maps
    scale = scale_from_zero(maps)
    with st.container(horizontal=True, key="words-maps"):
        for number, (word, values) in enumerate(zip(words, maps, strict=True)):
            with st.container(width=SMALL, gap="xsmall", key=f"word-{number}"):
                picture = draw_map(pixels, Map(values, scale), opacity)
                st.image(picture, width=SMALL, alt="map of a word")
                st.text(shortened(word, 20))
    st.caption(f"maps, dark to bright: {scale[0]:.3g} to {scale[1]:.3g}. {said}")


@lru_cache(maxsize=4096)
def small_bytes(path: Path, _digest: str) -> bytes:
    """A small picture, as a file of bytes; one that changes and is indexed again has another digest."""
    return as_bytes(on_square(open_thumbnail(path, SMALL), SMALL))


def small_picture(index: PictureIndex, name: str) -> bytes | None:
    """A picture of the index; None if it is gone or broken since it was indexed."""
    try:
        return small_bytes(index.path_of(name), index.pictures[index.number[name]].digest)
    except InputError:
        return None


def show_grid(
    index: PictureIndex,
    names: list[str],
    key: str,
    label: str,
    take: Callable[[str], None],
    below: Callable[[int], object],
) -> None:
    """Pictures of the index; ``below`` draws what stands under that of a number, ``take`` gets its name."""
    with st.container(horizontal=True, key=f"{key}s"):
        for number, name in enumerate(names):
            with st.container(width=SMALL, gap="xsmall", key=f"{key}-{number}"):
                picture = small_picture(index, name)
                if picture is None:
                    st.text("gone, or broken by now")
                else:
                    st.image(picture, width=SMALL, alt=printable(name))
                below(number)
                st.button(
                    label, key=f"{key}-{number}-go", on_click=take, args=(name,), disabled=picture is None
                )


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
