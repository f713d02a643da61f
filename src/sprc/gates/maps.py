"""Where the fusion edits the reference: maps of its gate and of its change, beside what was retrieved.

A map has a value a patch of the vision transformer's grid, P x P; [CLS], token 0, is left out.
"""

import textwrap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sprc.data.images import Transform, load_image
from sprc.data.split import Split, Triplet
from sprc.data.transforms import denormalise
from sprc.figures import Cell, draw_cell, make_grid, plt, save_figure
from sprc.map_colors import own_scale, scale_from_zero
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.fusion_maps import WordMaps, fusion_maps, word_maps
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.ranking import block_scores, target_ranks, top_k

TOP = 5
WIDE = 10  # cells in a row of a sheet of words
LETTERS = 15  # of a word over its cell


class QueryView(NamedTuple):
    """A query, what the fusion does to its reference, and what is retrieved for it."""

    triplet: Triplet
    # (P, P), in 0..1 but where tokens are weighted; None for a strategy without a gate, and without fusion.
    gate: Tensor | None
    change: Tensor | None  # (P, P), 0 or more; None without fusion
    rank: int | None  # of the target in the gallery, from 1; None where it is secret
    top: list[str]  # the best candidates' names, best first
    words: WordMaps | None = None  # where they were asked for


def view_queries(
    model: Blip2QformerCirAlignPrompt,
    split: Split,
    encoded: EncodedSplit,
    rows: list[int],
    transform: Transform,
    batch_size: int,
    *,
    per_word: bool = False,
) -> list[QueryView]:
    """The queries of the triplets ``rows`` of ``split``, in that order.

    Args:
        model: in eval mode, on its device.
        split: of CIRR (a reference is left out of its own ranking) or FashionIQ (it stays in).
        encoded: ``split``, encoded by ``model``.
        rows: indices of triplets.
        transform: the preprocessing the model was trained with.
        batch_size: references through the model at once.
        per_word: maps of each word as well, see :func:`word_maps`.
    """
    triplets = [split.triplets[row] for row in rows]
    ranks, best = rank_gallery(split, encoded, rows)
    names = list(split.image_paths)
    views = []
    for start in range(0, len(triplets), batch_size):
        batch = triplets[start : start + batch_size]
        references = torch.stack([load_image(split.image_paths[t.reference], transform) for t in batch])
        with torch.no_grad():
            embeds = model.encode_image(references.to(model.device))
        gates, changes = fusion_maps(model, embeds, [t.caption for t in batch])
        for i, triplet in enumerate(batch):
            gate, change = (None if maps is None else maps[i] for maps in (gates, changes))
            top = [names[candidate] for candidate in best[start + i]]
            words = word_maps(model, embeds[i : i + 1], triplet.caption) if per_word else None
            views.append(QueryView(triplet, gate, change, ranks[start + i], top, words))
    return views


def rank_gallery(
    split: Split, encoded: EncodedSplit, rows: list[int]
) -> tuple[list[int | None], list[list[int]]]:
    """For each of ``rows`` the target's rank, from 1, and the ``TOP`` best gallery indices."""
    scores = block_scores(encoded.composed[rows], encoded.gallery)
    references = None if split.ranks_reference else encoded.references[rows]
    ranks: list[int | None] = [None] * len(rows)
    if encoded.targets is not None:
        ranks = (target_ranks(scores, encoded.targets[rows], references) + 1).tolist()
    return ranks, top_k(scores, TOP, references).tolist()


def cells_of(view: QueryView) -> list[Cell]:
    """The pictures of a view: reference, maps, target, candidates.

    Each map is there twice: on the scale from 0 to 1, and on one from its least value to its largest.
    """
    triplet = view.triplet
    cells = [Cell("reference", triplet.reference)]
    for name, values in (("gate", view.gate), ("change", view.change)):
        if values is not None:
            cells.append(Cell(f"{name}, 0 to 1", triplet.reference, values))
            cells.append(Cell(f"{name}, own scale", triplet.reference, values, own_scale(values)))
    if triplet.target is not None:
        cells.append(Cell("target", triplet.target))
    for place, name in enumerate(view.top, start=1):
        right = None if triplet.target is None else name == triplet.target
        cells.append(Cell(f"top {place}", name, right=right))
    return cells


def word_cells_of(view: QueryView) -> list[list[Cell]]:
    """The maps of a view's words, a list a definition: each starts with the whole change.

    The words of one list are on one scale, from 0 to their largest value, so that they compare.
    """
    if view.words is None or view.change is None:
        return []
    names = [word if len(word) <= LETTERS else f"{word[: LETTERS - 3]}..." for word in view.words.words]

    def cells(kind: str, names: list[str], maps: Tensor) -> list[Cell]:
        scale = scale_from_zero(maps)
        return [
            Cell(f"{kind}{name}", view.triplet.reference, values, scale)
            for name, values in zip(names, maps, strict=True)
        ]

    change = cells("", ["change"], view.change[None])
    lists = [[*change, *cells("without: ", names, view.words.left_out)]]
    attention = view.words.attention
    if attention is not None:
        of_words = cells("reads: ", names, attention[:-1])
        lists.append([*change, *of_words, *cells("reads: ", ["[CLS], [SEP]"], attention[-1:])])
    return lists


def describe(view: QueryView) -> str:
    """One line: the pair, the rank if it is known, the caption."""
    rank = "" if view.rank is None else f", rank {view.rank}"
    return f"pair {view.triplet.pair_id}{rank}: {' '.join(view.triplet.caption.split())}"


def picture_of(split: Split, transform: Transform) -> Callable[[str], np.ndarray]:
    """A function from an image's name to the image as the model sees it, (S, S, 3) uint8."""

    @lru_cache(maxsize=256)  # queries share candidates; a whole gallery would fill the memory
    def picture(name: str) -> np.ndarray:
        image = denormalise(load_image(split.image_paths[name], transform))
        return (image.permute(1, 2, 0) * 255).round().byte().numpy()

    return picture


def draw_sheet(
    path: Path, views: list[QueryView], picture: Callable[[str], np.ndarray], *, down: bool = False
) -> None:
    """Write one PNG: a row a query, or with ``down`` a column a query, so that maps stand side by side.

    ``views`` are of one model and one split; ``picture`` is from :func:`picture_of`.
    """
    rows = [cells_of(view) for view in views]
    wide, high = (len(rows), len(rows[0])) if down else (len(rows[0]), len(rows))
    across = 0.5
    figure, axes = make_grid(
        high,
        wide,
        side=1.4,
        gaps=(across, 0.25 if down else 0.45),
        margins=(0.1, across, 0.1 if down else 0.3, 0.85 if down else 0.25),
    )
    for view, cells, row in zip(views, rows, axes.T if down else axes, strict=True):
        for cell, axis in zip(cells, row, strict=True):
            draw_cell(axis, cell, picture(cell.image))
        at = {"x": 0, "y": 1.2, "va": "bottom"} if down else {"x": 0, "y": -0.05, "va": "top"}
        write_caption(row[0], view, width=26 if down else 30 * wide, lines=4 if down else 1, **at)
    save_figure(figure, path)


def draw_word_sheet(path: Path, views: list[QueryView], picture: Callable[[str], np.ndarray]) -> None:
    """Write one PNG of the maps of words: some rows a query, under each other.

    ``views`` have ``words``; ``picture`` is from :func:`picture_of`.
    """
    rows = [
        (view, cells[start : start + WIDE], number == start == 0)
        for view in views
        for number, cells in enumerate(word_cells_of(view))
        for start in range(0, len(cells), WIDE)
    ]
    across = 0.5
    figure, axes = make_grid(len(rows), WIDE, side=1.4, gaps=(across, 0.45), margins=(0.1, across, 0.1, 0.45))
    for (view, cells, first), row in zip(rows, axes, strict=True):
        for cell, axis in zip(cells, row, strict=False):
            draw_cell(axis, cell, picture(cell.image))
        for axis in row[len(cells) :]:
            axis.axis("off")
        if first:
            write_caption(row[0], view, width=30 * WIDE, lines=1, x=0, y=1.18, va="bottom")
    save_figure(figure, path)


def write_caption(axis: plt.Axes, view: QueryView, *, width: int, lines: int, **at: Any) -> None:
    """Write what a view is of beside its first cell, in lines of ``width`` letters, which leave it."""
    # Captions are the users' words: never read them as math markup. One may be wider than its cell.
    text = "\n".join(textwrap.wrap(describe(view), width, max_lines=lines, placeholder=" ..."))
    axis.text(**at, s=text, fontsize=7.5, parse_math=False, transform=axis.transAxes)
