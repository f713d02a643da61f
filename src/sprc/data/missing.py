"""A data set of which some image files are missing: what is left out then, and where that is said.

FashionIQ's images were links to a shop, and many are dead. With ``--missing-images skip`` the images without
a file leave the gallery, and the triplets that need one are dropped. Figures of such a split are of fewer
queries and a smaller gallery than published ones, so the numbers stand beside each of them.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sprc.data.reading import quote
from sprc.data.split import LeftOut, Split, Triplet
from sprc.errors import InputError
from sprc.processes import objects_of_all_ranks


def has_file(path: Path) -> bool:
    """Whether there is a file at ``path``. If that cannot be known, yes: reading it will tell."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def leave_out(
    split: Split, missing: Collection[str], needed: Callable[[Triplet], Iterable[str | None]]
) -> Split:
    """``split`` without the images ``missing`` and the triplets that need one of them, in the same order.

    Raises :class:`InputError` if no triplet remains.
    """
    gone = dict.fromkeys(missing)
    triplets = [triplet for triplet in split.triplets if gone.keys().isdisjoint(needed(triplet))]
    if len(split.triplets) > len(triplets) == 0:
        raise InputError(
            f"{split.title}: {len(gone):,} images have no file, first {quote(next(iter(gone)))}, and so no "
            "triplet is left; put the images where the data set's README.md says, or correct --data-path"
        )
    return replace(
        split,
        triplets=triplets,
        image_paths={name: path for name, path in split.image_paths.items() if name not in gone},
        left_out=LeftOut(tuple(gone), len(split.triplets) - len(triplets)),
    )


def describe(split: Split) -> str:
    """What ``split`` was left without, in one line."""
    images, triplets = len(split.left_out.images), split.left_out.triplets
    return (
        f"{split.title}: {images:,} of {images + len(split.image_paths):,} images have no file; "
        f"--missing-images skip leaves them out, and {triplets:,} of {triplets + len(split.triplets):,} "
        "triplets"
    )


def tell_left_out(splits: Iterable[Split]) -> None:
    """Print what each of ``splits`` was left without.

    Raises :class:`InputError` if the ranks do not miss the same images.
    """
    splits = list(splits)
    first, *others = objects_of_all_ranks([split.left_out for split in splits])
    for number, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                f"--missing-images skip: rank {number} misses other images than rank 0; put the images on a "
                "disk that all machines share"
            )
    for split in splits:
        if split.left_out.images:
            print(describe(split), flush=True)


def left_out_columns(splits: Iterable[Split]) -> dict[str, int]:
    """What stands beside the figures of ``splits``: both numbers, or nothing where nothing was left out."""
    left_out = [split.left_out for split in splits]
    images, triplets = sum(len(one.images) for one in left_out), sum(one.triplets for one in left_out)
    return {"missing_images": images, "dropped_triplets": triplets} if images else {}


def left_out_text(splits: Iterable[Split]) -> str:
    """The same to put after a line."""
    return "".join(f", {name} {value:,}" for name, value in left_out_columns(splits).items())


def names_left_out(splits: list[Split]) -> dict[str, dict[str, Any]]:
    """What each split was left without, by its title: the names of images, the number of triplets."""
    return {
        split.title: {"images": list(split.left_out.images), "triplets": split.left_out.triplets}
        for split in splits
    }
