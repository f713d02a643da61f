"""Look at a finished run: loss and recall curves, a sheet of gate maps, and the table of recall."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sprc.data.captions import process_caption
from sprc.data.cirr import CirrSplit, load_cirr
from sprc.data.datasets import load_image
from sprc.data.transforms import denormalise, make_transform
from sprc.errors import InputError
from sprc.evaluation import Scorer
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.ranking import block_scores, top_k
from sprc.run_folder import write_atomically
from sprc.validation import EncodedSplit, modality_table

matplotlib.use("Agg")  # files only: works without a screen
from matplotlib import pyplot as plt

RIGHT, WRONG = "#2a9d4a", "#c0392b"
TOP = 5


def report_run(run_folder: Path, *, queries: int = 8, seed: int = 0, device: str | None = None) -> None:
    """Write `curves.png`, `gate_maps.png` and `recall_table.csv` into ``run_folder``; print the table.

    Raises :class:`InputError` if the run has no CSV files, no checkpoint, or its data is gone.
    """
    plot_curves(run_folder)
    checkpoint_file = run_folder / "saved_models" / "tuned_clip_arithmetic.pt"
    if not checkpoint_file.exists():
        raise InputError(f"{checkpoint_file} is missing; train with --save-training --save-best")
    scorer = Scorer.load(checkpoint_file, device=device)
    checkpoint = scorer.checkpoint
    told = checkpoint.hyperparameters
    if told["dataset"] != "cirr":
        raise InputError(f"{run_folder} was trained on {told['dataset']}; reports are made of CIRR runs")
    split = load_cirr(Path(told["data_path"]), "val")
    (encoded,) = scorer.encode([split])
    settings, model = scorer.settings, checkpoint.model
    transform = make_transform(settings["transform"], model.config.image_size, settings["target_ratio"])
    draw_gate_maps(model, split, encoded, transform, run_folder / "gate_maps.png", queries, seed)
    table = pd.DataFrame(modality_table(split, encoded)).T.rename_axis("query")
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


def draw_gate_maps(
    model: Blip2QformerCirAlignPrompt,
    split: CirrSplit,
    encoded: EncodedSplit,
    transform: Callable[[Image.Image], Tensor],
    path: Path,
    queries: int,
    seed: int,
) -> None:
    """Draw a row a query: reference, gate, size of the change, target, and the five best candidates.

    The gate is the mean over channels for each patch, on a fixed scale from 0 to 1; the change is the mean
    |fused - image|, on a scale from 0 to the sheet's largest. [CLS] is left out of both.
    """
    names = list(split.image_paths)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(split.triplets), generator=generator)[:queries].tolist()
    triplets = [split.triplets[number] for number in chosen]

    def picture(name: str) -> Tensor:
        return denormalise(load_image(split.image_paths[name], transform)).permute(1, 2, 0)

    references = torch.stack([load_image(split.image_paths[t.reference], transform) for t in triplets])
    gate, change = fusion_maps(model, references, [process_caption(t.caption) for t in triplets])
    scores = block_scores(encoded.composed[chosen], encoded.gallery)
    best = top_k(scores, TOP, encoded.references[chosen])

    figure, axes = plt.subplots(
        len(triplets),
        4 + TOP,
        figsize=(1.5 * (4 + TOP), 1.9 * len(triplets)),
        layout="constrained",
        squeeze=False,
    )
    largest = change.max().item() if change is not None else 1.0
    for row, triplet in enumerate(triplets):
        reference = picture(triplet.reference)
        cells = axes[row]
        cells[0].imshow(reference)
        cells[0].set_title("reference", fontsize=8)
        for cell, values, title, top in (
            (cells[1], gate, "gate (0 to 1)", 1.0),
            (cells[2], change, f"change (0 to {largest:.2g})", largest),
        ):
            if values is None:
                cell.set_title("no " + title.split()[0], fontsize=8)
                continue
            cell.imshow(reference)
            cell.imshow(values[row], cmap="viridis", alpha=0.75, vmin=0.0, vmax=top)
            cell.set_title(title, fontsize=8)
        cells[3].imshow(picture(triplet.target))
        cells[3].set_title("target", fontsize=8)
        for place_, candidate in enumerate(best[row].tolist()):
            cell = cells[4 + place_]
            right = names[candidate] == triplet.target
            cell.imshow(picture(names[candidate]))
            cell.set_title(f"top {place_ + 1}", fontsize=8, color=RIGHT if right else WRONG)
            cell.patch.set_visible(False)
            for spine in cell.spines.values():
                spine.set(color=RIGHT if right else WRONG, linewidth=3)
        for cell in cells:
            cell.set(xticks=[], yticks=[])
        # Captions are the users' words: never read them as math markup. One may be wider than its cell.
        caption = cells[0].text(0.0, -0.06, triplet.caption, fontsize=8, va="top", parse_math=False)
        caption.set(transform=cells[0].transAxes, in_layout=False)
    save_figure(figure, path)


@torch.no_grad()
def fusion_maps(
    model: Blip2QformerCirAlignPrompt, references: Tensor, captions: list[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Per-pixel maps of the mean gate and of the mean |fused - image|, each (B, S, S) on the CPU.

    Args:
        model: in eval mode.
        references: (B, 3, S, S), preprocessed.
        captions: B of them.

    Returns:
        None for what the model does not have: both without fusion, the gate in a strategy without one.
    """
    embeds = model.encode_image(references.to(model.device))
    fusion = model.fuse(embeds, model.tokenize(captions))
    if fusion is None:
        return None, None
    side = model.config.num_patches

    def upsample(values: Tensor) -> Tensor:
        grid = values.mean(dim=2)[:, 1:].unflatten(1, (side, side))[:, None].float().cpu()
        return interpolate(grid, size=references.shape[-2:], mode="nearest")[:, 0]

    gate = None if fusion.gate is None else upsample(fusion.gate)
    return gate, upsample((fusion.fused - embeds).abs())


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write the figure as PNG, atomically, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
    print(f"wrote {path}")
