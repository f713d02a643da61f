"""CIRR (Liu et al., ICCV 2021) as it is published, release rc2."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprc.data.datasets import Triplet, read_field, read_json, read_list, require_files
from sprc.errors import InputError

SPLITS = ("train", "val", "test1")


@dataclass(frozen=True)
class CirrSplit:
    """One split: its triplets, and all its images in the order of the split file, which is the gallery's."""

    name: str
    triplets: list[Triplet]
    image_paths: dict[str, Path]


def load_cirr(data_path: Path, split: str) -> CirrSplit:
    """Read and check the annotations of ``split``: "train", "val" or "test1".

    The targets of "test1" are secret, so they are None. ``data_path`` is the folder that holds
    `cirr_dataset/`. The images themselves are left to :func:`sprc.data.datasets.check_images`.
    Raises :class:`InputError` naming the file and the entry.
    """
    if split not in SPLITS:
        raise InputError(f"CIRR has no split {split!r}; choose from {', '.join(SPLITS)}")
    root = Path(data_path) / "cirr_dataset"
    split_file = root / "cirr" / "image_splits" / f"split.rc2.{split}.json"
    captions_file = root / "cirr" / "captions" / f"cap.rc2.{split}.json"
    require_files("CIRR", root, split_file, captions_file)
    image_paths = _read_image_paths(root, split_file)
    return CirrSplit(split, _read_triplets(captions_file, image_paths, split), image_paths)


def _read_image_paths(root: Path, split_file: Path) -> dict[str, Path]:
    images = read_json(split_file)
    if not isinstance(images, dict) or not images:
        raise InputError(f"{split_file} is not an object of image names and paths; download the file again")
    image_paths = {}
    for index, (name, location) in enumerate(images.items()):
        entry = f"{split_file}: entry {index} ({name!r})"
        if not isinstance(location, str):
            raise InputError(
                f"{entry}: the image's path is {location!r}; give a string such as './dev/name.png'"
            )
        relative = os.path.normpath(location)
        if os.path.isabs(relative) or relative in (".", "..") or relative.startswith(".." + os.sep):
            raise InputError(
                f"{entry}: the path {location!r} does not lead to a file inside {root}; correct it"
            )
        image_paths[name] = root / relative
    return image_paths


def _read_triplets(captions_file: Path, image_paths: dict[str, Path], split: str) -> list[Triplet]:
    triplets: dict[int, Triplet] = {}
    for index, entry in enumerate(read_list(captions_file)):
        try:
            triplet = _read_triplet(entry, image_paths, has_target=split != "test1")
            if triplet.pair_id in triplets:
                raise InputError("an earlier entry has the same pairid")
        except InputError as error:
            pair_id = entry.get("pairid") if isinstance(entry, dict) else None
            raise InputError(
                f"{captions_file}: entry {index} (pairid {pair_id!r}): {error}; "
                "correct the entry or download the file again"
            ) from None
        triplets[triplet.pair_id] = triplet
    return list(triplets.values())


def _read_triplet(entry: Any, image_paths: dict[str, Path], has_target: bool) -> Triplet:
    """Check one entry of a captions file; the :class:`InputError` says only what is wrong with it."""
    pair_id = read_field(entry, "pairid", int)
    reference = read_field(entry, "reference", str)
    target = read_field(entry, "target_hard", str) if has_target else None
    caption = read_field(entry, "caption", str)
    members = read_field(read_field(entry, "img_set", dict), "members", list)
    for member in members:
        if not isinstance(member, str):
            raise InputError(f"'members' holds {member!r}, which is not a string")
    for key, name in [
        ("reference", reference),
        ("target_hard", target),
        *(("members", name) for name in members),
    ]:
        if name is not None and name not in image_paths:
            raise InputError(f"{key!r} names {name!r}, which is not in the split's list of images")
    if len(set(members)) < 2:
        raise InputError("'members' holds fewer than 2 images")
    if reference not in members:
        raise InputError(f"the reference {reference!r} is not among the set's members")
    if has_target and target not in members:
        raise InputError(f"the target {target!r} is not among the set's members")
    if target == reference:
        raise InputError(f"{target!r} is both reference and target")
    return Triplet(pair_id, reference, target, caption, tuple(members))
