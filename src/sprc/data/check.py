"""Everything that is wrong with a data set on disk, where training would stop at the first thing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sprc.data import TYPES, circo, cirr, fashioniq
from sprc.data.images import inspect_images
from sprc.data.missing import describe
from sprc.data.reading import Report, quote, reporting
from sprc.data.split import Split

# What the authors' own files hold. An image of FashionIQ may be in several split files.
CIRR_TRIPLETS = {"train": 28_225, "val": 4_181, "test1": 4_148}
CIRR_SET_SIZE = 6
CIRR_IMAGES = 21_551
FASHIONIQ_ENTRIES, FASHIONIQ_IMAGES = 77_683, 74_381
CIRCO_QUERIES, CIRCO_IMAGES = {"val": 220, "test": 800}, 123_403


@dataclass
class Findings:
    """Lines for the user: what is there, what is worth knowing, what is wrong."""

    counts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    image_paths: dict[Path, None] = field(default_factory=dict)  # a set that keeps its order


def check_dataset(
    dataset: str, data_path: Path, decode: bool = False, missing_images: str = "error"
) -> Findings:
    """Check layout, every annotation and every image of a benchmark in ``data_path``.

    ``dataset`` is one of :data:`sprc.data.DATASETS`. The rules are those of its reader, which stops at the
    first problem. Sizes other than the published ones are notes: made data have others. With ``decode`` every
    image is decoded; without, header and end are looked at. What `--missing-images` "skip" leaves out is a
    note; with ``missing_images`` "skip" an image without a file is no problem besides.
    """
    findings = Findings()
    EXAMINE[dataset](data_path, findings, missing_images)
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


def examine_cirr(data_path: Path, findings: Findings, missing_images: str) -> None:
    """CIRR by the rules of :func:`sprc.data.cirr.load_cirr`; besides, its sets must hold 6 images."""
    total = 0
    for split, published in CIRR_TRIPLETS.items():
        loaded = cirr.load_cirr(data_path, split, findings.problems.append)
        findings.problems += _odd_sets(loaded)
        _look_for_missing(findings, loaded, cirr.without_missing, missing_images)
        total += len(loaded.image_paths)
        _count(findings, split, len(loaded.triplets), len(loaded.image_paths))
        if len(loaded.triplets) != published:
            findings.notes.append(f"{split}: {len(loaded.triplets):,} triplets; published are {published:,}")
    findings.counts.append(f"in all: {total:,} images")
    if total != CIRR_IMAGES:
        findings.notes.append(f"{total:,} images; published are {CIRR_IMAGES:,}")


def _odd_sets(split: Split) -> Iterator[str]:
    for triplet in split.triplets:
        if len(triplet.members) != CIRR_SET_SIZE:
            yield (
                f"cap.rc2.{split.name}.json: pairid {triplet.pair_id}: the set holds {len(triplet.members)} "
                f"different images, not {CIRR_SET_SIZE}; correct the entry or download the file again"
            )


def examine_fashioniq(data_path: Path, findings: Findings, missing_images: str) -> None:
    """FashionIQ by the rules of :func:`sprc.data.fashioniq.load_fashioniq`."""
    entries = 0
    images: set[str] = set()
    files: dict[str, Path] | None = None
    nothing_left = _on_nothing_left(findings, missing_images)
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
            entries += len(names)
            images |= names.keys()
            _count(findings, f"{split}, {dress_type}", len(triplets), len(names))
            if files is None:
                continue
            loaded = fashioniq.split_of_type(split, dress_type, triplets)
            with reporting(nothing_left):
                loaded = fashioniq.without_missing(loaded, names, files)
            if loaded.left_out.images:
                findings.notes.append(describe(loaded))
            split_file, _ = fashioniq.annotation_files(data_path, split, dress_type)
            for name, index in names.items():
                if name in loaded.image_paths or (name in files and missing_images == "error"):
                    findings.image_paths[files[name]] = None
                elif missing_images == "error":
                    findings.problems.append(
                        f"{split_file}: entry {index}: {quote(name)} has no .png, .jpg or .jpeg file "
                        "in images/; take a complete copy (some links that FashionIQ published are dead), or "
                        "leave it out with --missing-images skip"
                    )
    found = f"{entries:,} entries in split files, of {len(images):,} different images"
    findings.counts.append(f"in all: {found}")
    if (entries, len(images)) != (FASHIONIQ_ENTRIES, FASHIONIQ_IMAGES):
        findings.notes.append(
            f"{found}; published are {FASHIONIQ_ENTRIES:,} entries of {FASHIONIQ_IMAGES:,} images"
        )


def examine_circo(data_path: Path, findings: Findings, missing_images: str) -> None:
    """CIRCO by the rules of :func:`sprc.data.circo.load_circo`."""
    for split, published in CIRCO_QUERIES.items():
        loaded = circo.load_circo(data_path, split, report=findings.problems.append)
        _look_for_missing(findings, loaded, circo.without_missing, missing_images)
        targets = sum(1 + len(t.also_targets) for t in loaded.triplets if t.target is not None)
        told = f"{targets:,} targets" if targets else "secret targets"
        findings.counts.append(f"{split}: {len(loaded.triplets):,} queries, {told}")
        if len(loaded.triplets) != published:
            findings.notes.append(f"{split}: {len(loaded.triplets):,} queries; published are {published:,}")
    findings.counts.append(f"in all: {len(loaded.image_paths):,} images")
    if len(loaded.image_paths) != CIRCO_IMAGES:
        findings.notes.append(f"{len(loaded.image_paths):,} images; published are {CIRCO_IMAGES:,}")


# What looks at a benchmark's annotations, notes its findings, and takes --missing-images.
EXAMINE: dict[str, Callable[[Path, Findings, str], None]] = {
    "cirr": examine_cirr,
    "fashioniq": examine_fashioniq,
    "circo": examine_circo,
}


def _look_for_missing(
    findings: Findings, split: Split, without_missing: Callable[[Split], Split], missing_images: str
) -> None:
    """Note what `--missing-images` "skip" leaves out of a split, and which of its images are looked at."""
    rest = split
    with reporting(_on_nothing_left(findings, missing_images)):
        rest = without_missing(split)
    if rest.left_out.images:
        findings.notes.append(describe(rest))
    looked_at = rest if missing_images == "skip" else split
    findings.image_paths |= dict.fromkeys(looked_at.image_paths.values())


def _on_nothing_left(findings: Findings, missing_images: str) -> Report:
    """What is told that no triplet remains: no news where each missing image is a problem itself."""
    return findings.problems.append if missing_images == "skip" else lambda problem: None


def _count(findings: Findings, what: str, triplets: int, images: int) -> None:
    findings.counts.append(f"{what}: {triplets:,} triplets, {images:,} images")
