"""The files that CIRR's and CIRCO's servers take (``cirr_test_submission.py``), two each."""

from dataclasses import replace
from operator import methodcaller
from pathlib import Path

from sprc.data import CIRCO_QUERIES
from sprc.data.circo import load_circo
from sprc.data.cirr import load_cirr
from sprc.data.split import Split
from sprc.distributed import from_main
from sprc.errors import InputError
from sprc.files import compact_json, write_atomically
from sprc.models.device import start_device
from sprc.models.model_path import with_files
from sprc.run_folder import name_of_checkpoint
from sprc.scoring.ranking import Ranking
from sprc.scoring.scorer import Scorer
from sprc.scoring.settings import SubmissionSettings
from sprc.scoring.validation import TOP

TOP_IN_SET = 3
# Where CIRR's authors score test1, and the largest file that is taken there.
SERVER = "https://cirr.cecs.anu.edu.au/test_process/"
LARGEST_SUBMISSION = 5_000_000  # bytes
# Where CIRCO's authors score test. They name no size, but that a query has no more than 50 images.
CIRCO_SERVER = "https://circo.micc.unifi.it/"


def run_submission(settings: SubmissionSettings) -> tuple[Path, Path]:
    """Write a benchmark's two submission files for its test split and return their paths.

    CIRR's are the ranking of the gallery and that of the image sets. CIRCO's are the same ranking of the
    gallery, by the caption alone and by the caption with the shared concept: each is a submission of its own.
    Both are checked first, so that a file exists only if it is right.
    """
    settings.check_rerank()
    if len(settings.rerank_weight) > 1:
        raise InputError(
            "--rerank-weight: give one; blip_validate.py compares several on the validation split"
        )
    if settings.missing_images == "skip":
        raise InputError(
            "--missing-images skip: the server wants every query of the test split, ranked over all its "
            "images; restore the files and leave the flag out"
        )
    settings = with_files(settings)
    name = settings.name or name_of_checkpoint(settings.rerank or settings.model_path)
    if name != Path(name).name:
        raise InputError(f"--name {name} names a folder, too; give --out for the folder")
    device = start_device(settings.device)
    is_circo = settings.dataset == "circo"
    split = circo_queries(settings.data_path) if is_circo else load_cirr(settings.data_path, "test1")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {settings.out} cannot be made ({error.strerror}); give another folder"
        ) from error
    scorer = Scorer.from_settings(settings, device)
    with scorer.memory_explained():
        stages = scorer.stages([split], settings)
        (weight,) = settings.weights

        def write() -> tuple[Path, Path]:
            (ranking,) = stages.rankings(weight, TOP)
            if is_circo:
                return write_circo_submission(split, ranking, settings.out, name)
            return write_submission(split, ranking, settings.out, name, settings.data_path)

        return from_main(write)


def write_submission(
    split: Split, ranking: Ranking, out: Path, name: str, data_path: Path
) -> tuple[Path, Path]:
    """Check and write what :func:`run_submission` promises, into ``out``; ``name`` ends the files'."""
    names = list(split.image_paths)
    ids = [str(triplet.pair_id) for triplet in split.triplets]
    assert ranking.top is not None  # it was asked for
    assert ranking.set_order is not None  # CIRR has image sets
    files = []
    for metric, rows in (("recall", ranking.top), ("recall_subset", ranking.set_order[:, :TOP_IN_SET])):
        ranked = {pair_id: [names[i] for i in row] for pair_id, row in zip(ids, rows.tolist(), strict=True)}
        check_submission(split, metric, ranked)
        text = compact_json({"version": "rc2", "metric": metric, **ranked})
        if len(text) > LARGEST_SUBMISSION:
            raise InputError(
                f"the {metric} submission would have {len(text):,} bytes, and CIRR's server takes at most "
                f"{LARGEST_SUBMISSION:,}; {len(ids):,} queries of {data_path} are not CIRR's "
                "test1: correct --data-path"
            )
        files.append((out / f"{metric}_submission_{name}.json", text))
    write_files(files)
    print(f"send both to CIRR's evaluation server, {SERVER}")
    (recall, _), (recall_subset, _) = files
    return recall, recall_subset


def write_files(files: list[tuple[Path, bytes]]) -> None:
    """Write each path's text, all of which were checked before."""
    for path, text in files:
        write_atomically(path, methodcaller("write", text))
        print(f"wrote {path} ({len(text):,} bytes)")


def circo_queries(data_path: Path) -> Split:
    """CIRCO's test split with each query under both of its texts, first all of the one, then of the other.

    So the gallery, which is large, is encoded once.
    """
    first, *others = (load_circo(data_path, "test", query) for query in CIRCO_QUERIES)
    return replace(first, triplets=[*first.triplets, *(t for other in others for t in other.triplets)])


def write_circo_submission(split: Split, ranking: Ranking, out: Path, name: str) -> tuple[Path, Path]:
    """Check and write the two files of what :func:`circo_queries` gives: {query id: [50 image ids]}."""
    names = list(split.image_paths)
    assert ranking.top is not None  # it was asked for
    rows = ranking.top.tolist()
    count = len(rows) // len(CIRCO_QUERIES)
    files = []
    for place, query in enumerate(CIRCO_QUERIES):
        part = slice(place * count, (place + 1) * count)
        ranked = {
            str(triplet.pair_id): [int(names[i]) for i in row]
            for triplet, row in zip(split.triplets[part], rows[part], strict=True)
        }
        wanted = min(TOP, len(names))
        if len(ranked) != count or any(
            len({*row}) != wanted or len(row) != wanted for row in ranked.values()
        ):
            raise InputError(
                f"the {query} submission is not {wanted} different images for each query of test"
            )
        files.append((out / f"circo_submission_{query}_{name}.json", compact_json(ranked)))
    write_files(files)
    print(f"send the one whose text you report to CIRCO's evaluation server, {CIRCO_SERVER}")
    (caption, _), (concept, _) = files
    return caption, concept


def check_submission(split: Split, metric: str, ranked: dict[str, list[str]]) -> None:
    """Raise :class:`InputError` unless CIRR's server would take ``ranked``.

    Every pair id of the split once, with 50 names of the split (or 3 of the image set), each once, and
    never the reference.
    """
    if sorted(ranked) != sorted(str(triplet.pair_id) for triplet in split.triplets):
        raise InputError(f"the {metric} submission does not hold every pair id of {split.name} once")
    for triplet in split.triplets:
        row = ranked[str(triplet.pair_id)]
        allowed = set(triplet.members) if metric == "recall_subset" else set(split.image_paths)
        wanted = min(TOP_IN_SET if metric == "recall_subset" else TOP, len(allowed) - 1)
        if len(row) != wanted or len(set(row)) != wanted or not set(row) <= allowed - {triplet.reference}:
            raise InputError(
                f"the {metric} submission for pair {triplet.pair_id} is not {wanted} different names of "
                f"{'its image set' if metric == 'recall_subset' else split.name} without its reference"
            )
