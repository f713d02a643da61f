"""FashionIQ (Wu et al., CVPR 2021) as it is published."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from sprc.data import PROTOCOLS, TYPES
from sprc.data.missing import has_file, leave_out
from sprc.data.reading import (
    Report,
    quote,
    read_field,
    read_list,
    reporting,
    require_file,
    require_text,
    stop_at,
)
from sprc.data.split import Split, Triplet
from sprc.errors import InputError

SPLITS = ("train", "val", "test")
# Where an image is there more than once, the first of these is taken.
EXTENSIONS = (".png", ".jpg", ".jpeg")


def load_fashioniq(
    data_path: Path,
    split: str,
    dress_type: str,
    protocol: str = "original",
    *,
    missing_images: str = "error",
) -> Split:
    """Read and check the annotations of one type, and find its images: .png, .jpg or .jpeg, in any case.

    A triplet's ``caption`` is what validation takes, its ``training_captions`` are the four of training, its
    ``pair_id`` the place in the captions file. Its target may be its reference.

    Args:
        data_path: the folder that holds `fashionIQ_dataset/`.
        split: "train", "val" or "test"; the targets of "test" are None.
        dress_type: one of ``TYPES``.
        protocol: "original" makes all images of `image_splits` the gallery, "val-split" those that occur in
            the split's triplets. Figures of the two do not compare. Training needs no more than "val-split".
        missing_images: "skip" leaves out what has no file, see :func:`without_missing`.

    Raises:
        InputError: naming the file and the entry; an image of the gallery without a file is one as well, or a
            split of which nothing remains. Whether the images can be read is left to
            :func:`sprc.data.images.check_images`.
    """
    for what, choice, choices in (
        ("split", split, SPLITS),
        ("type", dress_type, TYPES),
        ("protocol (--fiq-protocol)", protocol, PROTOCOLS),
    ):
        if choice not in choices:
            raise InputError(f"FashionIQ has no {what} {choice!r}; choose from {', '.join(choices)}")
    names, triplets = read_annotations(data_path, split, dress_type)
    used = dict.fromkeys(name for t in triplets for name in (t.reference, t.target) if name is not None)
    gallery = list(names) if protocol == "original" else [name for name in names if name in used]
    paths = find_images(data_path)
    if missing_images == "skip":
        return without_missing(split_of_type(split, dress_type, triplets), gallery, paths)
    # The triplets' images first: without one of those even training is impossible.
    if missing := [name for name in dict.fromkeys([*used, *gallery]) if name not in paths]:
        split_file, captions_file = annotation_files(data_path, split, dress_type)
        first = missing[0]
        if first in used:
            entry = next(i for i, t in enumerate(triplets) if first in (t.reference, t.target))
            where = f"{captions_file}: entry {entry}"
        else:
            where = f"{split_file}: entry {names[first]}"
        raise InputError(
            f"{_root(data_path) / 'images'}: {len(missing)} of {len(gallery)} images have no .png, .jpg or "
            f".jpeg file, "
            f"{sum(name in used for name in missing)} of them in triplets; first: {quote(first)} ({where}); "
            "some links that FashionIQ published are dead: take a complete copy, correct --data-path, or "
            "leave them out with --missing-images skip"
        )
    return split_of_type(split, dress_type, triplets, {name: paths[name] for name in gallery})


def split_of_type(
    name: str, dress_type: str, triplets: list[Triplet], image_paths: dict[str, Path] | None = None
) -> Split:
    """One type's split. Its references are candidates: a target may be its query's own."""
    return Split(name, triplets, image_paths or {}, dress_type=dress_type, ranks_reference=True)


def without_missing(split: Split, gallery: Collection[str], files: dict[str, Path]) -> Split:
    """``split`` with the images of ``gallery`` that have a file, without the triplets that need another.

    Raises :class:`InputError` if no triplet remains.
    """
    # A link may lead nowhere.
    found = {name: files[name] for name in gallery if name in files and has_file(files[name])}
    missing = [name for name in gallery if name not in found]
    return leave_out(
        replace(split, image_paths=found), missing, lambda triplet: (triplet.reference, triplet.target)
    )


def _root(data_path: Path) -> Path:
    return Path(data_path) / "fashionIQ_dataset"


def annotation_files(data_path: Path, split: str, dress_type: str) -> tuple[Path, Path]:
    """The split file and the captions file."""
    root = _root(data_path)
    return (
        root / "image_splits" / f"split.{dress_type}.{split}.json",
        root / "captions" / f"cap.{dress_type}.{split}.json",
    )


def read_annotations(
    data_path: Path, split: str, dress_type: str, report: Report = stop_at
) -> tuple[dict[str, int], list[Triplet]]:
    """Read and check the split file, as {name: number of its entry}, and the captions file.

    Raises :class:`InputError` naming the file and the entry. Another ``report`` is told of each such problem
    instead, and what it is about is left out.
    """
    split_file, captions_file = annotation_files(data_path, split, dress_type)
    names, triplets = {}, []
    with reporting(report):
        require_file("FashionIQ", _root(data_path), split_file)
        names = _read_names(split_file, report)
    with reporting(report):
        require_file("FashionIQ", _root(data_path), captions_file)
        triplets = _read_triplets(captions_file, names, split != "test", report)
    return names, triplets


def _read_names(split_file: Path, report: Report) -> dict[str, int]:
    names: dict[str, int] = {}
    remedy = "; correct the entry or download the file again"
    for index, name in enumerate(read_list(split_file)):
        with reporting(report, f"{split_file}: entry {index}: ", remedy):
            if not isinstance(name, str):
                raise InputError(f"is a {type(name).__name__}, not a str")
            require_text(name, "the name")
            if name in names:
                raise InputError(f"{quote(name)} is entry {names[name]} already")
            names[name] = index
    return names


def _read_triplets(
    captions_file: Path, names: dict[str, int], has_target: bool, report: Report
) -> list[Triplet]:
    triplets = []
    remedy = "; correct the entry or download the file again"
    for index, entry in enumerate(read_list(captions_file)):
        with reporting(report, f"{captions_file}: entry {index}: ", remedy):
            triplets.append(_read_triplet(index, entry, names, has_target))
    return triplets


def _read_triplet(index: int, entry: Any, names: dict[str, int], has_target: bool) -> Triplet:
    """Check one entry of a captions file; the :class:`InputError` says only what is wrong with it."""
    reference = read_field(entry, "candidate", str)
    target = read_field(entry, "target", str) if has_target else None
    captions = read_field(entry, "captions", list)
    for key, name in (("candidate", reference), ("target", target)):
        # Without names the list itself is bad, and that has been reported.
        if name is not None and names and name not in names:
            raise InputError(f"{key!r} names {quote(name)}, which is not in the split's list of images")
    if len(captions) != 2:
        raise InputError(f"'captions' holds {len(captions)} texts, not 2")
    for caption in captions:
        require_text(caption, "'captions'")
    texts = combine_captions(*captions)
    return Triplet(index, reference, target, texts[0], training_captions=texts)


def combine_captions(first: str, second: str) -> tuple[str, str, str, str]:
    """SPRC's four texts of two captions: "A and b", which validation takes, "B and a", "A", "B".

    The captions lose ``.?,`` and spaces at both ends; capital A and B stand for those that begin with one.
    """
    a, b = (caption.strip(".?, ") for caption in (first, second))
    capital_a, capital_b = (caption[:1].upper() + caption[1:] for caption in (a, b))
    return f"{capital_a} and {b}", f"{capital_b} and {a}", capital_a, capital_b


def find_images(data_path: Path) -> dict[str, Path]:
    """The image files by name, from one listing a folder: 74,381 single questions would take minutes.

    They are in `images/` or in its folders `dress/`, `toptee/` and `shirt/`. Of several files of one name the
    one in `images/` is taken, else that of the first of these folders.
    Raises :class:`InputError` if there is no folder to list.
    """
    folder = _root(data_path) / "images"
    require_file("FashionIQ", _root(data_path), folder)
    types = [folder / dress_type for dress_type in TYPES]
    found: dict[str, Path] = {}
    for place in (folder, *(path for path in types if os.path.isdir(path))):
        found = _list_images(place) | found
    return found


def _list_images(folder: Path) -> dict[str, Path]:
    """The image files in ``folder`` itself."""
    try:
        files = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}); put FashionIQ's images there") from error
    found: dict[str, tuple[int, str]] = {}
    for file in files:
        name, extension = os.path.splitext(file)
        if extension.lower() in EXTENSIONS:
            candidate = (EXTENSIONS.index(extension.lower()), file)
            found[name] = min(candidate, found.get(name, candidate))
    return {name: folder / file for name, (_, file) in found.items()}
