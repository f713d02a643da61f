"""Look at a finished run: loss and recall curves, a sheet of gate maps, and the table of recall."""

from pathlib import Path

import pandas as pd
import torch

from sprc.checkpoint import load_checkpoint
from sprc.data.cirr import load_cirr
from sprc.data.datasets import check_images
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.figures import plt, save_figure
from sprc.gate_maps import draw_sheet, picture_of, view_queries
from sprc.models.factory import choose_device, place
from sprc.run_folder import write_atomically
from sprc.validation import encode_split, modality_table


def report_run(run_folder: Path, *, queries: int = 8, seed: int = 0, device: str | None = None) -> None:
    """Write `curves.png`, `gate_maps.png` and `recall_table.csv` into ``run_folder``; print the table.

    Raises :class:`InputError` if the run has no CSV files, no checkpoint, or its data is gone.
    """
    plot_curves(run_folder)
    checkpoint_file = run_folder / "saved_models" / "tuned_clip_arithmetic.pt"
    if not checkpoint_file.exists():
        raise InputError(f"{checkpoint_file} is missing; train with --save-training --save-best")
    checkpoint = load_checkpoint(checkpoint_file)
    settings = checkpoint.hyperparameters
    model = place(checkpoint.model, choose_device(device))
    transform = make_transform(settings["transform"], model.config.image_size, settings["target_ratio"])
    if settings["dataset"] != "cirr":
        raise InputError(f"{run_folder} was trained on {settings['dataset']}; reports are made of CIRR runs")
    split = load_cirr(Path(settings["data_path"]), "val")
    check_images(split.image_paths, split.image_paths)
    encoded = encode_split(
        model,
        split,
        transform,
        batch_size=settings["batch_size"],
        num_workers=settings["num_workers"],
        save_memory=settings["save_memory"],
    )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split.triplets), generator=generator)[:queries].tolist()
    views = view_queries(model, split, encoded, rows, transform, settings["batch_size"])
    draw_sheet(run_folder / "gate_maps.png", views, picture_of(split, transform))
    print(f"wrote {run_folder / 'gate_maps.png'}")
    table = pd.DataFrame(modality_table(encoded)).T.rename_axis("query")
    text = table.to_csv(lineterminator="\n")
    write_atomically(run_folder / "recall_table.csv", lambda file: file.write(text.encode()))
    shown = table[[name for name in table if "recall_at" in name]]
    shown = shown.rename(
        columns=lambda name: name.replace("group_recall_at", "R_s@").replace("recall_at", "R@")
    )
    print(f"\nCIRR validation split, recall in percent, epoch {checkpoint.epoch} of {run_folder}")
    print(shown.to_string(float_format=lambda value: f"{value:.1f}"))


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
