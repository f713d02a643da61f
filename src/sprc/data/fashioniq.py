"""FashionIQ (Wu et al., CVPR 2021) as it is published."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprc.data import PROTOCOLS, TYPES
from sprc.data.datasets import Triplet, read_field, read_list, require_files
from sprc.errors import InputError

SPLITS = ("train", "val", "test")
# Where an image is there more than once, the first of these is taken.
EXTENSIONS = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class FashionIQSplit:
    """One split of one type: its triplets, and its gallery's images in the order of the split file."""

    name: str
    dress_type: str
    triplets: list[Triplet]
    image_paths: dict[str, Path]


def load_fashioniq(
    data_path: Path, split: str, dress_type: str, protocol: str = "original"
) -> FashionIQSplit:
    """Read and check the annotations of one type, and find its images: .png, .jpg or .jpeg, in any case.

    A triplet's ``caption`` is what validation takes, its ``training_captions`` are the four of training, its
    ``pair_id`` the place in the captions file. Its target may be its reference.

    Args:
        data_path: the folder that holds `fashionIQ_dataset/`.
        split: "train", "val" or "test"; the targets of "test" are None.
        dress_type: one of ``TYPES``.
        protocol: "original" makes all images of `image_splits` the gallery, "val-split" those that occur in
            the split's triplets. Figures of the two do not compare. Training needs no more than "val-split".

    Raises:
        InputError: naming the file and the entry; an image of the gallery without a file is one as well.
            Whether the images can be read is left to :func:`sprc.data.datasets.check_images`.
    """
    for what, choice, choices in (
        ("split", split, SPLITS),
        ("type", dress_type, TYPES),
        ("protocol (--fiq-protocol)", protocol, PROTOCOLS),
    ):
        if choice not in choices:
            raise InputError(f"FashionIQ has no {what} {choice!r}; choose from {', '.join(choices)}")
    root = Path(data_path) / "fashionIQ_dataset"
    split_file = root / "image_splits" / f"split.{dress_type}.{split}.json"
    captions_file = root / "captions" / f"cap.{dress_type}.{split}.json"
    images = root / "images"
    require_files("FashionIQ", root, split_file, captions_file, images)

    names = _read_names(split_file)
    triplets = _read_triplets(captions_file, names, has_target=split != "test")
    used = dict.fromkeys(name for t in triplets for name in (t.reference, t.target) if name is not None)
    gallery = list(names) if protocol == "original" else [name for name in names if name in used]
    paths = _find_images(images)
    # The triplets' images first: without one of those even training is impossible.
    if missing := [name for name in dict.fromkeys([*used, *gallery]) if name not in paths]:
        first = missing[0]
        if first in used:
            entry = next(i for i, t in enumerate(triplets) if first in (t.reference, t.target))
            where = f"{captions_file}: entry {entry}"
        else:
            where = f"{split_file}: entry {names[first]}"
        raise InputError(
            f"{images}: {len(missing)} of {len(gallery)} images have no .png, .jpg or .jpeg file, "
            f"{sum(name in used for name in missing)} of them in triplets; first: {first!r} ({where}); "
            "some links that FashionIQ published are dead: take a complete copy, or correct --data-path"
        )
    return FashionIQSplit(split, dress_type, triplets, {name: paths[name] for name in gallery})


def _read_names(split_file: Path) -> dict[str, int]:
    """The names in the split file and their entries' numbers."""
    names: dict[str, int] = {}
    for index, name in enumerate(read_list(split_file)):
        if not isinstance(name, str):
            problem = f"is a {type(name).__name__}, not a str"
        elif name in names:
            problem = f"{name!r} is entry {names[name]} already"
        else:
            names[name] = index
            continue
        raise InputError(
            f"{split_file}: entry {index}: {problem}; correct the entry or download the file again"
        )
    return names


def _read_triplets(captions_file: Path, names: dict[str, int], has_target: bool) -> list[Triplet]:
    triplets = []
    for index, entry in enumerate(read_list(captions_file)):
        try:
            triplets.append(_read_triplet(index, entry, names, has_target))
        except InputError as error:
            raise InputError(
                f"{captions_file}: entry {index}: {error}; correct the entry or download the file again"
            ) from None
    return triplets


def _read_triplet(index: int, entry: Any, names: dict[str, int], has_target: bool) -> Triplet:
    """Check one entry of a captions file; the :class:`InputError` says only what is wrong with it."""
    reference = read_field(entry, "candidate", str)
    target = read_field(entry, "target", str) if has_target else None
    captions = read_field(entry, "captions", list)
    for key, name in (("candidate", reference), ("target", target)):
        if name is not None and name not in names:
            raise InputError(f"{key!r} names {name!r}, which is not in the split's list of images")
    if len(captions) != 2:
        raise InputError(f"'captions' holds {len(captions)} texts, not 2")
    for caption in captions:
        if not isinstance(caption, str):
            raise InputError(f"'captions' holds {caption!r}, which is not a string")
    texts = combine_captions(*captions)
    return Triplet(index, reference, target, texts[0], training_captions=texts)


def combine_captions(first: str, second: str) -> tuple[str, str, str, str]:
    """SPRC's four texts of two captions: "A and b", which validation takes, "B and a", "A", "B".

    The captions lose ``.?,`` and spaces at both ends; capital A and B stand for those that begin with one.
    """
    a, b = (caption.strip(".?, ") for caption in (first, second))
    capital_a, capital_b = (caption[:1].upper() + caption[1:] for caption in (a, b))
    return f"{capital_a} and {b}", f"{capital_b} and {a}", capital_a, capital_b


def _find_images(folder: Path) -> dict[str, Path]:
    """The image files in ``folder`` by name, from one listing: 77,684 single questions would take minutes."""
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
