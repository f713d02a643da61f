"""Everything that is wrong with a data set on disk, where training would stop at the first thing."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sprc.data import TYPES, cirr, fashioniq
from sprc.data.datasets import inspect_images, quote, reporting

# Spec of the published data sets. FashionIQ's images are counted over its split files.
CIRR_TRIPLETS = {"train": 28_225, "val": 4_181, "test1": 4_148}
CIRR_SET_SIZE = 6
PUBLISHED_IMAGES = {"cirr": 21_552, "fashioniq": 77_684}


@dataclass
class Findings:
    """Lines for the user: what is there, what is worth knowing, what is wrong."""

    counts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    image_paths: dict[Path, None] = field(default_factory=dict)  # a set that keeps its order


def check_dataset(dataset: str, data_path: Path, decode: bool = False) -> Findings:
    """Check layout, every annotation and every image of "cirr" or "fashioniq" in ``data_path``.

    The rules are those of :func:`load_cirr` and :func:`load_fashioniq`, which stop at the first problem; and
    CIRR's sets must hold 6 images. Sizes other than the published ones are notes: made data have others.
    With ``decode`` every image is decoded; without, header and end are looked at.
    """
    findings = Findings()
    if dataset == "cirr":
        total = _check_cirr(data_path, findings)
    else:
        total = _check_fashioniq(data_path, findings)
    findings.counts.append(f"in all: {total:,} images")
    if total != PUBLISHED_IMAGES[dataset]:
        findings.notes.append(f"{total:,} images; published are {PUBLISHED_IMAGES[dataset]:,}")
    found = inspect_images(list(findings.image_paths), decode)
    findings.problems += [finding.problem for finding in found if finding.problem]
    if rotated := sum(finding.is_rotated for finding in found):
        findings.notes.append(
            f"{rotated:,} images have EXIF data that ask for a rotation; they are taken as they are stored, "
            "because the published preprocessing ignores EXIF"
        )
    # The missing folder of a data set is found again by each of its splits.
    findings.problems = list(dict.fromkeys(findings.problems))
    return findings


def _check_cirr(data_path: Path, findings: Findings) -> int:
    total = 0
    for split, published in CIRR_TRIPLETS.items():
        loaded = cirr.load_cirr(data_path, split, findings.problems.append)
        findings.problems += _odd_sets(loaded)
        findings.image_paths |= dict.fromkeys(loaded.image_paths.values())
        total += len(loaded.image_paths)
        _count(findings, split, len(loaded.triplets), len(loaded.image_paths))
        if len(loaded.triplets) != published:
            findings.notes.append(f"{split}: {len(loaded.triplets):,} triplets; published are {published:,}")
    return total


def _odd_sets(split: cirr.CirrSplit) -> Iterator[str]:
    for triplet in split.triplets:
        if len(triplet.members) != CIRR_SET_SIZE:
            yield (
                f"cap.rc2.{split.name}.json: pairid {triplet.pair_id}: the set holds {len(triplet.members)} "
                f"different images, not {CIRR_SET_SIZE}; correct the entry or download the file again"
            )


def _check_fashioniq(data_path: Path, findings: Findings) -> int:
    total, files = 0, None
    with reporting(findings.problems.append):
        files = fashioniq.find_images(data_path)
    for split in fashioniq.SPLITS:
        for dress_type in TYPES:
            absent = [
                path.name
                for path in fashioniq.annotation_files(data_path, split, dress_type)
                if not path.exists()
            ]
            if split == "test" and absent:
                findings.notes.append(
                    f"{split}, {dress_type}: there is no {' and no '.join(absent)}; "
                    "neither training nor validation needs the test split"
                )
                continue
            names, triplets = fashioniq.read_annotations(
                data_path, split, dress_type, findings.problems.append
            )
            total += len(names)
            _count(findings, f"{split}, {dress_type}", len(triplets), len(names))
            if files is None:
                continue
            split_file, _ = fashioniq.annotation_files(data_path, split, dress_type)
            for name, index in names.items():
                if name in files:
                    findings.image_paths[files[name]] = None
                else:
                    findings.problems.append(
                        f"{split_file}: entry {index}: {quote(name)} has no .png, .jpg or .jpeg file "
                        "in images/; take a complete copy: some links that FashionIQ published are dead"
                    )
    return total


def _count(findings: Findings, what: str, triplets: int, images: int) -> None:
    findings.counts.append(f"{what}: {triplets:,} triplets, {images:,} images")
