"""Look at a finished run: loss and recall curves, a sheet of gate maps, and the table of recall."""

from pathlib import Path

import pandas as pd
import torch

from sprc.data.missing import describe, left_out_columns
from sprc.errors import InputError
from sprc.figures import plt, save_figure
from sprc.files import write_atomically
from sprc.gates.maps import draw_sheet, picture_of, view_queries
from sprc.models.device import start_device
from sprc.scoring.benchmarks import CIRR
from sprc.scoring.recall import rank_modalities
from sprc.scoring.scorer import Scorer


def report_run(
    run_folder: Path,
    *,
    data_path: Path | None = None,
    queries: int = 8,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Write `curves.png`, `gate_maps.png` and `recall_table.csv` into ``run_folder``; print the table.

    ``data_path`` is where the data are now; None takes the place where they were in training.
    Raises :class:`InputError` if the run has no CSV files, no checkpoint, or its data is gone.
    """
    on = start_device(device)
    plot_curves(run_folder)
    checkpoint_file = run_folder / "saved_models" / f"{CIRR.checkpoint}.pt"
    if not checkpoint_file.exists():
        raise InputError(f"{checkpoint_file} is missing; train with --save-training --save-best")
    scorer = Scorer.load(checkpoint_file, device=on)
    checkpoint = scorer.checkpoint
    told = checkpoint.hyperparameters
    if told["dataset"] != CIRR.key:
        raise InputError(f"{run_folder} was trained on {told['dataset']}; reports are made of CIRR runs")
    place = Path(told["data_path"]) if data_path is None else data_path
    split = CIRR.read(place, "val", missing_images=told.get("missing_images", "error"))
    (encoded,) = scorer.encode([split])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split.triplets), generator=generator)[:queries].tolist()
    batch_size = scorer.settings["batch_size"]
    views = view_queries(checkpoint.model, split, encoded, rows, scorer.transform, batch_size)
    draw_sheet(run_folder / "gate_maps.png", views, picture_of(split, scorer.transform))
    print(f"wrote {run_folder / 'gate_maps.png'}")
    rankings = rank_modalities(split, encoded)
    recalls = {query: CIRR.metrics_of({"": ranking}) for query, ranking in rankings.items()}
    table = pd.DataFrame(recalls).T.rename_axis("query")
    table = table.assign(**left_out_columns([split]))
    text = table.to_csv(lineterminator="\n")
    write_atomically(run_folder / "recall_table.csv", lambda file: file.write(text.encode()))
    shown = table[[name for name in table if "recall_at" in name]]
    shown = shown.rename(
        columns=lambda name: name.replace("group_recall_at", "R_s@").replace("recall_at", "R@")
    )
    print(f"\nCIRR validation split, recall in percent, epoch {checkpoint.epoch} of {run_folder}")
    print(shown.to_string(float_format=lambda value: f"{value:.1f}"))
    if split.left_out.images:
        print(describe(split))


def plot_curves(run_folder: Path) -> None:
    """Draw losses, recall and, where they were logged, the fusion's diagnostics over epochs."""
    files = [run_folder / name for name in ("train_metrics.csv", "validation_metrics.csv")]
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
    save_figure(figure, run_folder / "curves.png")
    print(f"wrote {run_folder / 'curves.png'}")
