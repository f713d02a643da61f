"""Triplets beside a training set's own: machine-written ones, as users download them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sprc.data.reading import quote, read_field, read_list, reporting, require_text, stop_at
from sprc.data.split import Triplet
from sprc.errors import InputError


class Keys(NamedTuple):
    """What a captions file of a benchmark calls the parts of a triplet."""

    reference: str
    target: str
    caption: str


def load_extra(
    path: Path, keys: Keys, image_paths: Mapping[str, Path], missing: Collection[str] = ()
) -> list[Triplet]:
    """Read triplets in the format of a benchmark's captions file, over images of its training split.

    An entry needs the three parts alone. Its caption may be a text or a list of texts, of which training
    takes one at random. The files that SPN4CIR (ACM MM 2024) publishes for CIRR are so, with one `pairid` for
    all and a placeholder for the image set: neither is looked at. A triplet's ``pair_id`` is its place in the
    file.

    Args:
        path: of the JSON file.
        keys: the names of the parts.
        image_paths: of the training split's images.
        missing: images that ``--missing-images skip`` leaves out, and with them the triplets that need them.

    Raises:
        InputError: naming the file and the entry.
    """
    if not path.is_file():
        raise InputError(f"--extra-triplets {path} is missing; give a JSON file of triplets")
    triplets = []
    entries = read_list(path)
    for place, entry in enumerate(entries):
        where = f"--extra-triplets {path}: entry {place}: "
        with reporting(stop_at, where, "; correct the entry, or take it out"):
            triplet = _read_triplet(place, entry, keys, image_paths, missing)
            if triplet is not None:
                triplets.append(triplet)
    if not triplets:
        raise InputError(f"--extra-triplets {path}: each of its {len(entries):,} entries lacks an image")
    return triplets


def _read_triplet(
    place: int, entry: Any, keys: Keys, image_paths: Mapping[str, Path], missing: Collection[str]
) -> Triplet | None:
    """Check one entry; the :class:`InputError` says only what is wrong with it. None: an image is missing."""
    names = [read_field(entry, key, str) for key in (keys.reference, keys.target)]
    texts = entry.get(keys.caption)
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts:
        raise InputError(f"{keys.caption!r} is neither a text nor a list of texts")
    for text in texts:
        require_text(text, repr(keys.caption))
    for key, name in zip((keys.reference, keys.target), names, strict=True):
        if name not in image_paths and name not in missing:
            raise InputError(f"{key!r} names {quote(name)}, which is no image of the training split")
    reference, target = names
    if reference == target:
        raise InputError(f"{quote(target)} is both reference and target")
    if reference in missing or target in missing:
        return None
    return Triplet(
        place, reference, target, texts[0], training_captions=tuple(texts) if len(texts) > 1 else ()
    )
