"""The two files that CIRR's server takes (``cirr_test_submission.py``)."""

from operator import methodcaller
from pathlib import Path

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


def run_submission(settings: SubmissionSettings) -> tuple[Path, Path]:
    """Write CIRR's two submission files for test1 and return their paths.

    Both are checked first, so that a file exists only if it is right.
    """
    settings.check_rerank()
    if len(settings.rerank_weight) > 1:
        raise InputError(
            "--rerank-weight: give one; blip_validate.py compares several on the validation split"
        )
    if settings.missing_images == "skip":
        raise InputError(
            "--missing-images skip: CIRR's server wants every query of test1, ranked over all its images; "
            "restore the files and leave the flag out"
        )
    settings = with_files(settings)
    name = settings.name or name_of_checkpoint(settings.rerank or settings.model_path)
    if name != Path(name).name:
        raise InputError(f"--name {name} names a folder, too; give --out for the folder")
    device = start_device(settings.device)
    split = load_cirr(settings.data_path, "test1")
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
        return from_main(
            lambda: write_submission(
                split, stages.rankings(weight, TOP)[0], settings.out, name, settings.data_path
            )
        )


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
    for path, text in files:
        write_atomically(path, methodcaller("write", text))
        print(f"wrote {path} ({len(text):,} bytes)")
    print(f"send both to CIRR's evaluation server, {SERVER}")
    (recall, _), (recall_subset, _) = files
    return recall, recall_subset


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
