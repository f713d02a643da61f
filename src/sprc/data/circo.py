"""CIRCO (Baldrati et al., ICCV 2023) as it is published: queries with several targets over COCO's images.

It has no training split. Its gallery is that of both splits: the 123,403 images of COCO 2017 unlabeled.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sprc.data import CIRCO_QUERIES
from sprc.data.missing import has_file, leave_out
from sprc.data.reading import (
    Report,
    quote,
    read_field,
    read_json,
    read_list,
    reporting,
    require_file,
    require_text,
    stop_at,
)
from sprc.data.split import Split, Triplet
from sprc.errors import InputError

SPLITS = ("val", "test")
# What the authors say that a caption asks for, in the order of their evaluation.
ASPECTS = (
    "cardinality",
    "addition",
    "negation",
    "direct_addressing",
    "compare_change",
    "comparative_statement",
    "statement_with_conjunction",
    "spatial_relations_background",
    "viewpoint",
)


def load_circo(
    data_path: Path,
    split: str,
    query: str = CIRCO_QUERIES[0],
    report: Report = stop_at,
    *,
    missing_images: str = "error",
) -> Split:
    """Read and check the annotations of ``split``: "val", or "test", whose targets are secret, so None.

    An image's name is its COCO id in digits. A triplet's target is the image that its caption was written
    for, and its ``also_targets`` are the other true ones.

    Args:
        data_path: the folder that holds `circo_dataset/`.
        split: one of ``SPLITS``.
        query: one of ``CIRCO_QUERIES``, see :func:`query_text`.
        report: is told of each problem instead of an error, and what it is about is left out of the split.
        missing_images: "skip" leaves out what has no file, see :func:`without_missing`.

    Raises:
        InputError: naming the file and the entry. The images themselves are left to
            :func:`sprc.data.images.check_images`.
    """
    for what, choice, choices in (
        ("split", split, SPLITS),
        ("query text (--circo-query)", query, CIRCO_QUERIES),
    ):
        if choice not in choices:
            raise InputError(f"CIRCO has no {what} {choice!r}; choose from {', '.join(choices)}")
    image_paths, triplets = {}, []
    with reporting(report):
        image_paths = read_gallery(data_path, report)
    with reporting(report):
        file = annotations_file(data_path, split)
        require_file("CIRCO", _root(data_path), file)
        triplets = _read_triplets(file, image_paths, split, query, report)
    loaded = Split(split, triplets, image_paths, ranks_reference=True, several_targets=True)
    return without_missing(loaded) if missing_images == "skip" else loaded


def query_text(caption: str, concept: str, query: str) -> str:
    """What the model reads of a query.

    "caption" is the relative caption alone, as CIRCO's authors score their own method. "concept" puts what
    reference and target share before it, in the words of MagicLens (ICML 2024), which later papers take over.
    """
    return caption if query == "caption" else f"find {concept} but {caption}"


def without_missing(split: Split) -> Split:
    """``split`` without the images that have no file, and without the triplets that need one of those.

    A triplet needs all of its targets: its average precision is over their number.
    Raises :class:`InputError` if no triplet remains.
    """
    missing = {name: None for name, path in split.image_paths.items() if not has_file(path)}
    return leave_out(split, missing, lambda t: (t.reference, t.target, *t.also_targets))


def _root(data_path: Path) -> Path:
    return Path(data_path) / "circo_dataset"


def annotations_file(data_path: Path, split: str) -> Path:
    """The file of the queries of ``split``."""
    return _root(data_path) / "annotations" / f"{split}.json"


def read_gallery(data_path: Path, report: Report = stop_at) -> dict[str, Path]:
    """The files of all images by their names, in the order of COCO's list.

    Raises :class:`InputError` naming the file and the entry; another ``report`` is told instead, see
    :func:`load_circo`.
    """
    root = _root(data_path) / "COCO2017_unlabeled"
    listing = root / "annotations" / "image_info_unlabeled2017.json"
    require_file("CIRCO", _root(data_path), listing)
    content = read_json(listing)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{listing} holds no list of 'images'; download the file again")
    folder = root / "unlabeled2017"
    paths: dict[str, Path] = {}
    for index, entry in enumerate(entries):
        with reporting(report, f"{listing}: entry {index}: ", "; download the file again"):
            name, file = str(read_field(entry, "id", int)), read_field(entry, "file_name", str)
            if os.path.basename(file) != file or file in ("", ".", "..") or "\0" in file:
                raise InputError(f"'file_name' is {quote(file)}, which is no file in {folder.name}/")
            if name in paths:
                raise InputError(f"the id {name} is an earlier entry's already")
            paths[name] = folder / file
    return paths


def _read_triplets(
    file: Path, images: dict[str, Path], split: str, query: str, report: Report
) -> list[Triplet]:
    triplets: dict[int, Triplet] = {}
    for index, entry in enumerate(read_list(file)):
        number = entry.get("id") if isinstance(entry, dict) else None
        where = f"{file}: entry {index} (id {quote(number)}): "
        with reporting(report, where, "; correct the entry or download the file again"):
            triplet = _read_triplet(entry, images, query, has_target=split != "test")
            if triplet.pair_id in triplets:
                raise InputError("an earlier entry has the same id")
            triplets[triplet.pair_id] = triplet
    return list(triplets.values())


def _read_triplet(entry: Any, images: dict[str, Path], query: str, has_target: bool) -> Triplet:
    """Check one entry of an annotations file; the :class:`InputError` says only what is wrong with it."""
    number = read_field(entry, "id", int)
    reference = _known("reference_img_id", read_field(entry, "reference_img_id", int), images)
    caption, concept = (read_field(entry, key, str) for key in ("relative_caption", "shared_concept"))
    target, targets = None, []
    if has_target:
        target = _known("target_img_id", read_field(entry, "target_img_id", int), images)
        targets = [_known("gt_img_ids", image, images) for image in read_field(entry, "gt_img_ids", list)]
        if target not in targets:
            raise InputError(f"the target {target} is not among 'gt_img_ids'")
        if len(set(targets)) < len(targets):
            raise InputError("'gt_img_ids' names an image twice")
        if reference in targets:
            raise InputError(f"{reference} is both reference and target")
    return Triplet(
        number,
        reference,
        target,
        query_text(caption, concept, query),
        also_targets=tuple(name for name in targets if name != target),
        aspects=_aspects(entry),
    )


def _known(key: str, image: Any, images: Iterable[str]) -> str:
    """The name of the image that ``key`` gives."""
    if type(image) is not int:
        raise InputError(f"{key!r} holds {quote(image)}, which is not an int")
    # Without images the list itself is bad, and that has been reported.
    if images and str(image) not in images:
        raise InputError(f"{key!r} names {image}, which is not in COCO's list of images")
    return str(image)


def _aspects(entry: dict[str, Any]) -> tuple[str, ...]:
    """An entry's semantic aspects; the files' first version has none, and that of test never has."""
    if "semantic_aspects" not in entry:
        return ()
    aspects = read_field(entry, "semantic_aspects", list)
    for aspect in aspects:
        require_text(aspect, "'semantic_aspects'")
        if aspect not in ASPECTS:
            raise InputError(f"'semantic_aspects' holds {quote(aspect)}, not one of {', '.join(ASPECTS)}")
    return tuple(dict.fromkeys(aspects))
