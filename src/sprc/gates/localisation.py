"""Does the fusion edit the right place? Numbers on the built-in data, whose edits are known.

The built-in data tell for each triplet the kind of its edit and the cells of the scene that it concerns. A
map over the reference's patches is held against them by

    share     how much of the map's sum falls on the edit; a patch that a cell covers in part counts in part
    chance    the edit's share of the image's area, which a flat map has as its share
    ratio     share / chance, of each query
    pointing  does the largest patch lie on the edit? The pointing game (Zhang et al., Top-down Neural
              Attention by Excitation Backprop, ECCV 2016); a random patch scores chance

Each map is made a second time with the *caption of another query*. A map that prefers objects to background
scores above chance under any caption; only the gain of the query's own caption over it follows the text.

    gain      share minus the share under another query's caption
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sprc.data.edits import GRID, KINDS, PlacedEdit
from sprc.data.images import Transform, load_image
from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.fusion_maps import fusion_maps, patch_grid
from sprc.models.losses import similarity

RESAMPLES = 2000
FLAT = 1e-5  # patches this near to the largest, relatively, are as large: the rest is rounding


def require_squares(split: Split) -> None:
    """Raise :class:`InputError` unless every reference is square.

    A square image passes each transform whole, neither padded nor cropped, so that its cells keep their
    share of the area. Of another one they would not.
    """
    for name in dict.fromkeys(triplet.reference for triplet in split.triplets):
        width, height = load_image(split.image_paths[name], lambda image: image.size)
        if width != height:
            raise InputError(
                f"{split.image_paths[name]} has {width} x {height} pixels; --localisation needs the built-in "
                "data's square images: make them again with make_demo_data.py"
            )


def edit_weights(cells: Sequence[tuple[int, int]], patches: int) -> Tensor:
    """The share of each patch's area that lies in ``cells``: (patches, patches), in 0..1.

    ``cells`` are (row, column) of GRID x GRID over the whole square image, each once.
    """
    edges = torch.arange(patches + 1, dtype=torch.float64) / patches
    weights = torch.zeros(patches, patches, dtype=torch.float64)
    for cell in cells:
        # The overlap of the cell's interval with each patch's, in shares of the patch, by row and by column.
        rows, columns = (
            (edges[1:].clamp(max=(i + 1) / GRID) - edges[:-1].clamp(min=i / GRID)).clamp(min=0) * patches
            for i in cell
        )
        weights += rows[:, None] * columns
    return weights


def shares(maps: Tensor, weights: Tensor) -> Tensor:
    """Share of each map's sum on the edit: (T, P, P) maps, 0 or more, and weights to (T,).

    A map that is zero everywhere prefers no place: it counts as flat, and has the share of chance.
    """
    total = maps.sum(dim=(1, 2))
    on_edit = (maps * weights).sum(dim=(1, 2))
    return torch.where(total > 0, on_edit / total.clamp(min=torch.finfo(total.dtype).tiny), chance(weights))


def chance(weights: Tensor) -> Tensor:
    """The edit's share of the area: (T, P, P) to (T,)."""
    return weights.mean(dim=(1, 2))


def pointing(maps: Tensor, weights: Tensor) -> Tensor:
    """The edit's share of the largest patch of each map: (T, P, P) maps and weights to (T,).

    It is 0 or 1 where patches lie wholly inside cells or outside. Of patches that are equally large the mean.
    """
    largest = maps.amax(dim=(1, 2), keepdim=True)
    first = (maps >= largest * (1 - FLAT)).to(weights.dtype)
    return (first * weights).sum(dim=(1, 2)) / first.sum(dim=(1, 2))


def gradient_attribution(
    model: Blip2QformerCirAlignPrompt, image_embeds: Tensor, captions: list[str], target_feats: Tensor
) -> Tensor:
    """Gradient times input of the similarity of query and target, a value a patch: (B, P, P), 0 or more.

    With x (N, D) the reference's image tokens, normalised, as the model's fusion (or, without one, the
    Q-Former's call 1) reads them, q(x) the composed query and T (Q, E) the features of the query's *true*
    target, taken as constants,

        s = max_k q(x) . T_k            the similarity that the ranking is made of
        a_n = sum_d | x_nd * ds/dx_nd |

    (Simonyan et al., Deep Inside Convolutional Networks, 2014; times the input as in Shrikumar et al., 2016,
    but with absolute values before the sum, so that channels of different sign do not cancel.) [CLS] is left
    out. With fusion the gradient passes through it.

    Args:
        model: in eval mode; no parameter gets a gradient.
        image_embeds: (B, N, D) from ``model.encode_image``.
        captions: B of them.
        target_feats: (B, Q, E) from ``model.target_features``.
    """
    tokens = image_embeds.detach().requires_grad_()
    queries = model.compose(tokens, model.tokenize(captions))
    own = similarity(queries, target_feats.detach()).diagonal()
    # A row depends on its own tokens alone, so one backward pass gives the gradient of each.
    (gradient,) = torch.autograd.grad(own.sum(), tokens)
    return patch_grid((tokens * gradient).abs().sum(dim=2).detach(), model.config.num_patches)


def make_maps(
    model: Blip2QformerCirAlignPrompt,
    split: Split,
    edits: list[PlacedEdit],
    captions: list[str],
    transform: Transform,
    batch_size: int,
    label: str,
) -> dict[str, Tensor]:
    """The model's maps of each triplet of ``split`` under ``captions``, (T, P, P) float64 each.

    `gate` and `change` where the model has them, see :func:`fusion_maps`, and `attribution`.
    """
    found: dict[str, list[Tensor]] = {}

    def encode(names: list[str]) -> Tensor:
        images = torch.stack([load_image(split.image_paths[name], transform) for name in names])
        return model.encode_image(images.to(model.device))

    for start in tqdm(range(0, len(edits), batch_size), desc=label, unit="batch", leave=False):
        rows = slice(start, start + batch_size)
        with torch.no_grad():
            image_embeds = encode([triplet.reference for triplet in split.triplets[rows]])
            target_feats = model.target_features(encode([edit.target for edit in edits[rows]]))
        gate, change = fusion_maps(model, image_embeds, captions[rows])
        attribution = gradient_attribution(model, image_embeds, captions[rows], target_feats)
        for name, maps in (("gate", gate), ("change", change), ("attribution", attribution)):
            if maps is not None:
                found.setdefault(name, []).append(maps.double())
    result = {name: torch.cat(batches) for name, batches in found.items()}
    for name, maps in result.items():
        if not maps.isfinite().all():
            raise FloatingPointError(f"the {name} maps are not finite: the model's weights hold NaN or inf")
    return result


def other_captions(triplets: list[Triplet], seed: int) -> list[str]:
    """For each triplet the caption of another one, each used once, drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(triplets))
    captions = [""] * len(triplets)
    for place, row in enumerate(order):  # a ring: no triplet is its own neighbour
        captions[row] = triplets[order[place - 1]].caption
    return captions


def localise(
    model: Blip2QformerCirAlignPrompt,
    label: str,
    split: Split,
    edits: list[PlacedEdit],
    transform: Transform,
    batch_size: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of the table for one model: each map, each caption (own, another), each kind of edit.

    Args:
        model: in eval mode, on its device.
        label: "fused" or "off"; it stands in the column `model`.
        split: all its triplets are used.
        edits: of its triplets, from :func:`sprc.data.edits.read_edits`.
        transform: the preprocessing the model was trained with.
        batch_size: triplets at once.
        seed: of the other captions and of the bootstrap.
    """
    weights = torch.stack([edit_weights(edit.cells, model.config.num_patches) for edit in edits])
    kinds = [edit.kind for edit in edits]
    captions = {"own": [triplet.caption for triplet in split.triplets]}
    if len(edits) > 1:
        captions["another"] = other_captions(split.triplets, seed)
    maps = {
        name: make_maps(model, split, edits, texts, transform, batch_size, f"maps of {label}, {name} caption")
        for name, texts in captions.items()
    }
    rows = []
    for map_name in maps["own"]:
        for name, found in maps.items():
            others = maps["another"][map_name] if name == "own" and len(maps) > 1 else None
            for row in summarise(found[map_name], weights, kinds, others, seed):
                rows.append({"model": label, "map": map_name, "caption": name, **row})
    return rows


def summarise(
    maps: Tensor, weights: Tensor, kinds: list[str], others: Tensor | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Means over queries, of all kinds and of each, with bootstrap intervals.

    An interval is the 2.5 % and 97.5 % percentile of the mean over resampled queries (Efron 1979); the
    queries of one image are taken as independent, so it is rather too narrow.

    Args:
        maps: (T, P, P), 0 or more.
        weights: (T, P, P) from :func:`edit_weights`.
        kinds: T of ``KINDS``.
        others: the maps under another query's caption; `gain` is what the share is larger than theirs.
        seed: of the resampling.
    """
    expected, share = chance(weights), shares(maps, weights)
    values = {"share": share, "ratio": share / expected, "pointing": pointing(maps, weights)}
    if others is not None:
        values["gain"] = share - shares(others, weights)
    table = torch.stack(list(values.values()), dim=1).numpy()
    rows = []
    for kind in ("all", *KINDS):
        chosen = [i for i, own in enumerate(kinds) if kind in ("all", own)]
        if not chosen:
            continue
        numbers, count = table[chosen], len(chosen)
        generator = np.random.default_rng(seed)
        means = [numbers[generator.integers(count, size=count)].mean(axis=0) for _ in range(RESAMPLES)]
        low, high = np.percentile(means, (2.5, 97.5), axis=0)
        row = {"kind": kind, "queries": count, "chance": expected[chosen].mean().item()}
        for i, name in enumerate(values):
            mean = numbers[:, i].mean()
            row |= {name: float(mean), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
        rows.append(row)
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table to print: shares in percent, intervals in brackets."""
    names = ("model", "map", "caption", "kind", "queries")
    columns = {"share": ("share %", 100, 2), "ratio": ("ratio", 1, 3), "pointing": ("pointing %", 100, 1)}
    columns["gain"] = ("gain %", 100, 2)
    lines = [(*names, "chance %", *(header for header, _, _ in columns.values()))]
    for row in rows:
        cells = [*(str(row[name]) for name in names), f"{100 * row['chance']:.1f}"]
        for name, (_, factor, digits) in columns.items():
            if name in row:
                mean, low, high = (
                    round(factor * row[name + end], digits) + 0.0 for end in ("", "_low", "_high")
                )
                cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
            else:
                cells.append("")
        lines.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
