"""The page of gate maps: one HTML file that needs nothing else, neither files nor a network."""

import base64
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template

import numpy as np
from matplotlib import colormaps
from PIL import Image

from sprc.figures import RIGHT, WRONG, Cell
from sprc.files import write_atomically
from sprc.gates.maps import QueryView, cells_of, word_cells_of
from sprc.map_colors import COLORS, OPACITY, colored

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --opacity: $opacity; }
body { font: 14px/1.35 sans-serif; margin: 0 1em 2em; color: #222; background: #fff; }
header { position: sticky; top: 0; z-index: 1; padding: .5em 0; background: #fff; }
header, .group { border-bottom: 1px solid #ccc; }
h1 { font-size: 1.1em; margin: 0 0 .3em; }
label, button { margin-right: .8em; }
.group { display: flex; gap: 1em; overflow-x: auto; padding: .6em 0; }
.query h2 { font-size: 1em; font-weight: normal; margin: 0 0 .4em; overflow-wrap: anywhere; }
.cells { display: flex; flex-wrap: wrap; gap: .5em; }
.several .query { flex: 0 0 17em; }
figure { margin: 0; width: 8em; font-size: .85em; }
.frame { position: relative; width: 8em; height: 8em; }
.frame img { position: absolute; width: 100%; height: 100%; }
.frame .map { image-rendering: pixelated; opacity: var(--opacity); }
.right .frame, .wrong .frame { outline: 3px solid $right; outline-offset: -3px; z-index: 0; }
.right .frame img, .wrong .frame img { z-index: -1; }
.wrong .frame { outline-color: $wrong; }
.right figcaption { color: $right; } .wrong figcaption { color: $wrong; }
.bar { display: flex; gap: .3em; align-items: center; font-size: .85em; }
.bar i { flex: 1; height: .6em; background: linear-gradient(to right, $colors); }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$note</p>
<button data-key="rank" data-sign="1">best rank first</button>
<button data-key="rank" data-sign="-1">worst rank first</button>
<button data-key="order" data-sign="1">as chosen</button>
<label>maps <input id="opacity" type="range" min="0" max="1" step="0.05" value="$opacity"></label>
</header>
<main id="queries">
$groups
</main>
<script>
const queries = document.getElementById("queries");
for (const button of document.querySelectorAll("button")) {
  const { key, sign } = button.dataset;
  button.onclick = () => queries.append(
    ...[...queries.children].sort((a, b) => sign * (a.dataset[key] - b.dataset[key])));
}
document.getElementById("opacity").oninput = (event) =>
  document.documentElement.style.setProperty("--opacity", event.target.value);
</script>
</body>
</html>
""")


def write_page(
    path: Path,
    title: str,
    note: str,
    groups: Iterable[list[QueryView]],
    picture: Callable[[str], np.ndarray],
) -> None:
    """Write the page, atomically: a section a group, a group's queries side by side.

    A section's ``data-rank`` is the best rank of its queries (empty where it is secret), its ``data-order``
    its place in ``groups``. All text is escaped.

    Args:
        path: of the HTML file.
        title: of the page.
        note: a sentence or two that stand above the queries.
        groups: queries; those of one group share one image.
        picture: from :func:`sprc.gates.maps.picture_of`.
    """
    sections = [_section(order, views, picture) for order, views in enumerate(groups)]
    steps = (colormaps[COLORS](np.linspace(0, 1, 9), bytes=True)[:, :3]).tolist()
    text = PAGE.substitute(
        title=html.escape(title),
        note=html.escape(note),
        opacity=OPACITY,
        right=RIGHT,
        wrong=WRONG,
        colors=", ".join(f"rgb({red} {green} {blue})" for red, green, blue in steps),
        groups="\n".join(sections),
    )
    write_atomically(path, lambda file: file.write(text.encode()))


def _section(order: int, views: list[QueryView], picture: Callable[[str], np.ndarray]) -> str:
    ranks = [view.rank for view in views if view.rank is not None]
    kind = "group several" if len(views) > 1 else "group"
    queries = []
    for view in views:
        lists = [cells_of(view), *word_cells_of(view)]
        figures = "".join(
            f'<div class="cells">{"".join(_figure(cell, picture(cell.image)) for cell in cells)}</div>'
            for cells in lists
        )
        rank = "" if view.rank is None else f" &middot; <b>rank {view.rank}</b>"
        queries.append(
            f'<article class="query"><h2>pair {view.triplet.pair_id}{rank} &middot; '
            f"<q>{html.escape(view.triplet.caption)}</q></h2>{figures}</article>"
        )
    return (
        f'<section class="{kind}" data-order="{order}" data-rank="{min(ranks, default="")}">'
        f"{''.join(queries)}</section>"
    )


def _figure(cell: Cell, image: np.ndarray) -> str:
    mark = {None: "", True: " ✓ right", False: " ✗ wrong"}[cell.right]
    kind = {None: "", True: "right", False: "wrong"}[cell.right]
    layers = f'<img alt="{html.escape(cell.image)}" src="{_data(image, "JPEG")}">'
    bar = ""
    if cell.values is not None:
        low, high = cell.scale
        layers += f'<img class="map" alt="" src="{_data(colored(cell.values, cell.scale), "PNG")}">'
        bar = f'<div class="bar">{low:.3g}<i></i>{high:.3g}</div>'
    return (
        f'<figure class="{kind}" title="{html.escape(cell.image)}"><div class="frame">{layers}</div>'
        f"{bar}<figcaption>{html.escape(cell.title)}{mark}</figcaption></figure>"
    )


def _data(pixels: np.ndarray, kind: str) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
