"""Look at a finished run: loss and recall curves, a sheet of gate maps, and the table of recall."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sprc.data.edits import read_edits
from sprc.data.missing import describe, left_out_columns
from sprc.errors import InputError
from sprc.figures import plt, save_figure
from sprc.files import write_atomically
from sprc.gates.maps import draw_sheet, picture_of, view_queries
from sprc.models.device import start_device
from sprc.run_folder import RunFolder
from sprc.scoring.benchmarks import CIRR
from sprc.scoring.kinds import recall_by_kind
from sprc.scoring.recall import rank_modalities
from sprc.scoring.scorer import Scorer
from sprc.training.settings import TrackerSettings
from sprc.training.trackers import Trackers, require_trackers, trackers_of

COMPOSED = "reference and text"  # the whole query among the three of rank_modalities
BY_KIND = ("recall_at1", "recall_at5", "group_recall_at1")


def report_run(
    path: Path,
    *,
    data_path: Path | None = None,
    queries: int = 8,
    seed: int = 0,
    device: str | None = None,
    report_to: Sequence[str] | None = None,
) -> None:
    """Write `curves.png`, `gate_maps.png` and `recall_table.csv` into a run's folder; print the table.

    Where the data tell the kinds of their edits, as the built-in ones do, `recall_by_kind.csv` as well.
    ``data_path`` is where the data are now; None takes the place where they were in training. All of it goes
    to the run in ``report_to``, trackers' names; None takes those that its training told.
    Raises :class:`InputError` if ``queries`` is below 1, the run has no CSV files or no checkpoint, its data
    is gone, or a file of edits is broken or of other triplets.
    """
    if queries < 1:
        raise InputError(f"--queries {queries}: give a whole number of at least 1")
    run_folder = RunFolder(path)
    trackers = choose_trackers(run_folder, report_to)
    on = start_device(device)
    plot_curves(run_folder)
    checkpoint_file = run_folder.checkpoint(CIRR.checkpoint)
    if not checkpoint_file.exists():
        raise InputError(f"{checkpoint_file} is missing; train with --save-training --save-best")
    scorer = Scorer.load(checkpoint_file, device=on)
    checkpoint = scorer.checkpoint
    told = checkpoint.hyperparameters
    if told["dataset"] != CIRR.key:
        raise InputError(f"{run_folder} was trained on {told['dataset']}; reports are made of CIRR runs")
    place = trained_on(run_folder) if data_path is None else data_path
    split = CIRR.read(place, "val", missing_images=told.get("missing_images", "error"))
    edits_file = CIRR.edits_file(place, split.name, split.dress_type)
    edits = read_edits(edits_file, split) if edits_file.exists() else None
    (encoded,) = scorer.encode([split])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split.triplets), generator=generator)[:queries].tolist()
    batch_size = scorer.settings["batch_size"]
    views = view_queries(checkpoint.model, split, encoded, rows, scorer.transform, batch_size)
    draw_sheet(run_folder.gate_maps, views, picture_of(split, scorer.transform))
    print(f"wrote {run_folder.gate_maps}")
    rankings = rank_modalities(split, encoded)
    recalls = {query: CIRR.metrics_of({"": ranking}) for query, ranking in rankings.items()}
    table = pd.DataFrame(recalls).T.rename_axis("query").assign(**left_out_columns([split]))
    write_table(table, run_folder.recall_table)
    print(f"\nCIRR validation split, recall in percent, epoch {checkpoint.epoch} of {run_folder}")
    print(shown(table))
    if edits is not None:
        rows = recall_by_kind([edit.kind for edit in edits], rankings[COMPOSED], BY_KIND)
        table = pd.DataFrame(rows).set_index("kind").assign(**left_out_columns([split]))
        write_table(table, run_folder.recall_by_kind)
        print(f"\nBy kind of edit, {COMPOSED}")
        print(shown(table))
    if split.left_out.images:
        print(describe(split))
    with Trackers.start(trackers, run_folder) as told_to:
        for file in (run_folder.curves, run_folder.gate_maps, run_folder.recall_table):
            told_to.add(file)
        if edits is not None:
            told_to.add(run_folder.recall_by_kind)


def choose_trackers(run_folder: RunFolder, report_to: Sequence[str] | None) -> tuple[str, ...]:
    """The trackers of ``report_to``, whose packages must be there; or for None those that the run names."""
    if report_to is None:
        return trackers_of(read_hyperparameters(run_folder))
    settings = TrackerSettings(report_to=report_to)
    settings.check_trackers()
    require_trackers(settings.trackers)
    return settings.trackers


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` as a CSV file."""
    text = table.to_csv(lineterminator="\n")
    write_atomically(path, lambda file: file.write(text.encode()))


def shown(table: pd.DataFrame) -> str:
    """``table`` to print: its recalls under the names of papers, and the number of queries, if it has one."""
    columns = table[[name for name in table if name == "queries" or "recall_at" in name]]
    columns = columns.rename(
        columns=lambda name: name.replace("group_recall_at", "R_s@").replace("recall_at", "R@")
    )
    return columns.to_string(float_format=lambda value: f"{value:.1f}")


def trained_on(run_folder: RunFolder) -> Path:
    """Where the run's data were; its checkpoint, which travels, does not say it."""
    place = read_hyperparameters(run_folder).get("data_path")
    if not isinstance(place, str):
        file = run_folder.hyperparameters
        raise InputError(f"{file} does not say where the data are; give --data-path")
    return Path(place)


def read_hyperparameters(run_folder: RunFolder) -> dict[str, Any]:
    """What the run's file says; a broken one says nothing."""
    try:
        found = json.loads(run_folder.hyperparameters.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def plot_curves(run_folder: RunFolder) -> None:
    """Draw losses, recall and, where they were logged, the fusion's diagnostics over epochs."""
    files = [run_folder.train_metrics, run_folder.validation_metrics]
    for file in files:
        if not file.exists():
            raise InputError(f"{file} is missing; give the folder of a run that has finished an epoch")
    train, validation = (pd.read_csv(file, index_col="epoch") for file in files)
    losses = [name for name in train if "loss" in name]
    panels = {
        "training losses": train[losses],
        "recall on validation, percent": validation[
            ["recall_at1", "recall_at5", "recall_at10", "group_recall_at1"]
        ],
    }
    if diagnostics := [name for name in train if name not in losses]:
        panels["fusion"] = train[diagnostics]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained")
    for axis, (title, frame) in zip(axes, panels.items(), strict=True):
        frame.plot(ax=axis, title=title, xlabel="epoch", grid=True, marker="." if len(frame) < 30 else None)
    save_figure(figure, run_folder.curves)
    print(f"wrote {run_folder.curves}")
