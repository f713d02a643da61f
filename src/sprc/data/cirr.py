"""CIRR (Liu et al., ICCV 2021) as it is published, release rc2."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sprc.data.datasets import (
    Report,
    Triplet,
    quote,
    read_field,
    read_json,
    read_list,
    reporting,
    require_file,
    require_text,
    stop_at,
)
from sprc.errors import InputError

SPLITS = ("train", "val", "test1")


@dataclass(frozen=True)
class CirrSplit:
    """One split: its triplets, and all its images in the order of the split file, which is the gallery's."""

    name: str
    triplets: list[Triplet]
    image_paths: dict[str, Path]


def load_cirr(data_path: Path, split: str, report: Report = stop_at) -> CirrSplit:
    """Read and check the annotations of ``split``: "train", "val" or "test1".

    The targets of "test1" are secret, so they are None. ``data_path`` is the folder that holds
    `cirr_dataset/`. The images themselves are left to :func:`sprc.data.datasets.check_images`.
    Raises :class:`InputError` naming the file and the entry. Another ``report`` is told of each such problem
    instead, and what it is about is left out of the split.
    """
    if split not in SPLITS:
        raise InputError(f"CIRR has no split {split!r}; choose from {', '.join(SPLITS)}")
    root = Path(data_path) / "cirr_dataset"
    images, image_paths, triplets = {}, {}, []
    with reporting(report):
        split_file = root / "cirr" / "image_splits" / f"split.rc2.{split}.json"
        require_file("CIRR", root, split_file)
        images = _read_images(split_file)
        image_paths = _read_image_paths(root, split_file, images, report)
    with reporting(report):
        captions_file = root / "cirr" / "captions" / f"cap.rc2.{split}.json"
        require_file("CIRR", root, captions_file)
        triplets = _read_triplets(captions_file, images, split, report)
    return CirrSplit(split, triplets, image_paths)


def edits_of_test1(data_path: Path) -> Path:
    """Where the made benchmark keeps the targets of test1; CIRR itself has no such file."""
    return Path(data_path) / "cirr_dataset" / "edits.test1.json"


def load_cirr_test(data_path: Path) -> CirrSplit:
    """The made benchmark's test1 with its targets, which :func:`load_cirr` leaves out.

    Raises :class:`InputError` naming the file and the entry; CIRR's own test1 has no public targets.
    """
    path = edits_of_test1(data_path)
    if not path.exists():
        raise InputError(
            f"{path} is missing: only the built-in data have targets for test1; score the val split, or send "
            "CIRR's server what cirr_test_submission.py writes"
        )
    split, edits = load_cirr(data_path, "test1"), read_json(path)
    triplets = []
    for triplet in split.triplets:
        try:
            edit = read_field(edits, str(triplet.pair_id), dict)
            target = read_field(edit, "target", str)
            if target not in triplet.members or target == triplet.reference:
                raise InputError(f"the target {quote(target)} is not another member of the image set")
        except InputError as error:
            raise InputError(f"{path}: pairid {triplet.pair_id}: {error}; make the data again") from error
        triplets.append(replace(triplet, target=target))
    return replace(split, triplets=triplets)


def _read_images(split_file: Path) -> dict[str, Any]:
    images = read_json(split_file)
    if not isinstance(images, dict) or not images:
        raise InputError(f"{split_file} is not an object of image names and paths; download the file again")
    return images


def _read_image_paths(
    root: Path, split_file: Path, images: dict[str, Any], report: Report
) -> dict[str, Path]:
    image_paths = {}
    for index, (name, location) in enumerate(images.items()):
        where = f"{split_file}: entry {index} ({quote(name)}): "
        with reporting(report, where, "; correct the entry or download the file again"):
            require_text(name, "the name")
            require_text(location, "the image's path")
            relative = os.path.normpath(location)
            outside = os.path.isabs(relative) or relative.split(os.sep)[0] in (".", "..")
            if outside or "\0" in location:
                raise InputError(f"the path {quote(location)} does not lead to a file inside {root}")
            image_paths[name] = root / relative
    return image_paths


def _read_triplets(captions_file: Path, images: dict[str, Any], split: str, report: Report) -> list[Triplet]:
    triplets: dict[int, Triplet] = {}
    for index, entry in enumerate(read_list(captions_file)):
        pair_id = entry.get("pairid") if isinstance(entry, dict) else None
        where = f"{captions_file}: entry {index} (pairid {quote(pair_id)}): "
        with reporting(report, where, "; correct the entry or download the file again"):
            triplet = _read_triplet(entry, images, has_target=split != "test1")
            if triplet.pair_id in triplets:
                raise InputError("an earlier entry has the same pairid")
            triplets[triplet.pair_id] = triplet
    return list(triplets.values())


def _read_triplet(entry: Any, images: dict[str, Any], has_target: bool) -> Triplet:
    """Check one entry of a captions file; the :class:`InputError` says only what is wrong with it."""
    pair_id = read_field(entry, "pairid", int)
    reference = read_field(entry, "reference", str)
    target = read_field(entry, "target_hard", str) if has_target else None
    caption = read_field(entry, "caption", str)
    members = read_field(read_field(entry, "img_set", dict), "members", list)
    for member in members:
        require_text(member, "'members'")
    for key, name in [
        ("reference", reference),
        ("target_hard", target),
        *(("members", name) for name in members),
    ]:
        # Without images the list itself is bad, and that has been reported.
        if name is not None and images and name not in images:
            raise InputError(f"{key!r} names {quote(name)}, which is not in the split's list of images")
    if len(set(members)) < 2:
        raise InputError("'members' holds fewer than 2 images")
    if reference not in members:
        raise InputError(f"the reference {quote(reference)} is not among the set's members")
    if has_target and target not in members:
        raise InputError(f"the target {quote(target)} is not among the set's members")
    if target == reference:
        raise InputError(f"{quote(target)} is both reference and target")
    # A member that is there twice would beat the target twice.
    return Triplet(pair_id, reference, target, caption, tuple(dict.fromkeys(members)))
