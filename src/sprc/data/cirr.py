"""CIRR (Liu et al., ICCV 2021) as it is published, release rc2."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

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

SPLITS = ("train", "val", "test1")


def canonical_split(name: str) -> str:
    """The name in CIRR's files: its third split is "test1" there, and "test" means the same."""
    return "test1" if name == "test" else name


def load_cirr(
    data_path: Path, split: str, report: Report = stop_at, *, missing_images: str = "error"
) -> Split:
    """Read and check the annotations of ``split``: "train", "val", or "test1", which "test" means as well.

    The targets of "test1" are secret, so they are None. ``data_path`` is the folder that holds
    `cirr_dataset/`. The images themselves are left to :func:`sprc.data.images.check_images`; with
    ``missing_images`` "skip" what has no file is left out, see :func:`without_missing`.
    Raises :class:`InputError` naming the file and the entry. Another ``report`` is told of each such problem
    instead, and what it is about is left out of the split.
    """
    split = canonical_split(split)
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
    loaded = Split(split, triplets, image_paths)
    return without_missing(loaded) if missing_images == "skip" else loaded


def without_missing(split: Split) -> Split:
    """``split`` without the images that have no file, and without the triplets that need one of those.

    A triplet needs all of its set: among fewer members its target would be easier to find. In training, where
    sets do not count, it needs reference and target, and its set loses the member.
    Raises :class:`InputError` if no triplet remains.
    """
    missing = {name: None for name, path in split.image_paths.items() if not has_file(path)}
    if split.name != "train":
        return leave_out(split, missing, lambda triplet: triplet.members)
    rest = leave_out(split, missing, lambda triplet: (triplet.reference, triplet.target))
    triplets = [replace(t, members=tuple(m for m in t.members if m not in missing)) for t in rest.triplets]
    return replace(rest, triplets=triplets)


def edits_of_test1(data_path: Path) -> Path:
    """Where the made benchmark keeps the targets of test1; CIRR itself has no such file."""
    return Path(data_path) / "cirr_dataset" / "edits.test1.json"


def load_cirr_test(data_path: Path, *, missing_images: str = "error") -> Split:
    """The made benchmark's test1 with its targets, which :func:`load_cirr` leaves out.

    Raises :class:`InputError` naming the file and the entry; CIRR's own test1 has no public targets.
    """
    path = edits_of_test1(data_path)
    if not path.exists():
        raise InputError(
            f"{path} is missing: only the built-in data have targets for test1; score the val split, or send "
            "CIRR's server what cirr_test_submission.py writes"
        )
    split, edits = load_cirr(data_path, "test1", missing_images=missing_images), read_json(path)
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
    places: dict[str, tuple[str, str]] = {}  # the topmost folder, and the whole path
    for index, (name, location) in enumerate(images.items()):
        where = f"{split_file}: entry {index} ({quote(name)}): "
        with reporting(report, where, "; correct the entry or download the file again"):
            require_text(name, "the name")
            require_text(location, "the image's path")
            relative = os.path.normpath(location)
            outside = os.path.isabs(relative) or relative.split(os.sep)[0] in (".", "..")
            if outside or "\0" in location:
                raise InputError(f"the path {quote(location)} does not lead to a file inside {root}")
            places[name] = (os.path.dirname(relative).split(os.sep)[0], relative)
    parents = {folder: _parent_of(root, folder) for folder in {folder for folder, _ in places.values()}}
    return {name: parents[folder] / relative for name, (folder, relative) in places.items()}


def _parent_of(root: Path, folder: str) -> Path:
    """Where the images' ``folder`` (train, dev or test1) lies: ``root``, else a folder in it.

    NLVR2's archive of the training images unpacks to `images/train/`.
    Raises :class:`InputError` if it is in two.
    """
    if os.path.exists(root / folder):
        return root
    found = sorted(path for path in root.iterdir() if os.path.isdir(path / folder))
    if len(found) > 1:
        raise InputError(
            f"{folder}/ is in {found[0]} and in {found[1]}; leave one of them, or move it to {root}"
        )
    return found[0] if found else root


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
    members = list(dict.fromkeys(members))
    return Triplet(pair_id, reference, target, caption, tuple(members), also_targets=_also(entry, target))


def _also(entry: Any, target: str | None) -> tuple[str, ...]:
    """The images beside ``target`` that an entry's `target_soft`, if it has one, gives more than 0."""
    if target is None or "target_soft" not in entry:
        return ()
    soft = read_field(entry, "target_soft", dict)
    for name, share in soft.items():
        if type(share) not in (int, float):
            raise InputError(f"'target_soft' gives {quote(name)} {quote(share)}, which is not a number")
    return tuple(name for name, share in soft.items() if share > 0 and name != target)
