"""A run's folder: what is called how in it, and how the folder itself is called."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

from sprc.errors import InputError

START = "clip_finetuned_on_"  # of every run folder's name
# What a run keeps of a benchmark's best epoch, the weights of a saved model, and what these once were called.
BEST = ("tuned_clip_arithmetic.pt", "tuned_clip_best.pt")
HUB_WEIGHTS = "model.safetensors"
PRETRAINED = "model.pt"
PICKLES = (".bin", ".pkl", ".pickle", ".ckpt", ".pth")


class RunFolder(os.PathLike[str]):
    """The files of one run. Only this class knows their names; a file need not be there.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def create(cls, models: Path, short_name: str, model_name: str) -> RunFolder:
        """Make ``models/clip_finetuned_on_{short_name}_{model_name}_{time}`` and return it.

        ``short_name`` is the benchmark's, "cirr" or "fiq". Two runs that start in the same second get
        different folders.
        """
        stem = f"{START}{short_name}_{model_name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        for attempt in range(1000):
            folder = cls(models / (f"{stem}-{attempt}" if attempt else stem))
            try:
                folder.checkpoints.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(f"cannot make the run folder {folder} ({error})") from error
            return folder
        raise InputError(f"{models}: a thousand runs were started in one second; wait and try again")

    @classmethod
    def all_in(cls, models: Path) -> list[RunFolder]:
        """The runs in ``models``, by their names."""
        return [cls(path) for path in sorted(models.glob(f"{START}*"))]

    @property
    def hyperparameters(self) -> Path:
        """JSON: what the run was started with; with it a run goes on."""
        return self.path / "training_hyperparameters.json"

    @property
    def missing_images(self) -> Path:
        """JSON: what ``--missing-images skip`` left out."""
        return self.path / "missing_images.json"

    @property
    def noisy_triplets(self) -> Path:
        """CSV: which training triplets ``--noise-ratio`` made wrong, a row each."""
        return self.path / "noisy_triplets.csv"

    @property
    def train_metrics(self) -> Path:
        """CSV: losses, a row an epoch."""
        return self.path / "train_metrics.csv"

    @property
    def validation_metrics(self) -> Path:
        """CSV: recall, a row a validation."""
        return self.path / "validation_metrics.csv"

    @property
    def step_times(self) -> Path:
        """CSV: seconds a step, a row an epoch; what two runs of one seed do not share."""
        return self.path / "step_times.csv"

    @property
    def fusion_metrics(self) -> Path:
        """CSV: what the fusion does, a row every so many steps."""
        return self.path / "fusion_metrics.csv"

    @property
    def tensorboard(self) -> Path:
        """The folder of what goes to TensorBoard."""
        return self.path / "tensorboard"

    @property
    def mlflow(self) -> Path:
        """The folder of MLflow's files, where the environment names no other place; wandb's is `wandb`."""
        return self.path / "mlruns"

    @property
    def trackers(self) -> Path:
        """JSON: by what wandb and MLflow know the run."""
        return self.path / "trackers.json"

    @property
    def curves(self) -> Path:
        """PNG: losses and recall over epochs."""
        return self.path / "curves.png"

    @property
    def gate_maps(self) -> Path:
        """PNG: a sheet of gate maps."""
        return self.path / "gate_maps.png"

    @property
    def recall_table(self) -> Path:
        """CSV: recall of queries with image and text, and of each alone."""
        return self.path / "recall_table.csv"

    @property
    def recall_by_kind(self) -> Path:
        """CSV: recall of each kind of edit, where the data tell the kinds."""
        return self.path / "recall_by_kind.csv"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints and of the state."""
        return self.path / "saved_models"

    @property
    def state(self) -> Path:
        """Where the run goes on, while it is not finished."""
        return self.checkpoints / "training_state.pt"

    @property
    def epoch_state(self) -> Path:
        """The state at the beginning of the epoch, where :attr:`state` is within it.

        Another number of ranks cannot go on within an epoch: each has random numbers of its own.
        """
        return self.checkpoints / "training_state_of_epoch.pt"

    @property
    def bank(self) -> Path:
        """The training images' features that queries are contrasted with, and of which epoch."""
        return self.checkpoints / "bank.safetensors"

    @property
    def mined(self) -> Path:
        """The negatives that were drawn for each query, and for which epochs."""
        return self.checkpoints / "mined.safetensors"

    def checkpoint(self, name: str) -> Path:
        """The checkpoint of that name: the benchmark's for the best epoch, ``tuned_clip_N`` for epoch N."""
        return self.checkpoints / f"{name}.pt"

    def only_checkpoint(self) -> Path:
        """The one checkpoint of a run with ``--save-best``: its best epoch on the validation split."""
        return next(self.checkpoints.glob("tuned_clip_*.pt"))


def name_of_checkpoint(path: Path) -> str:
    """What a checkpoint is called: the name of its run's folder, or its own where it is in none.

    A saved model is called as its folder is; the model hub's cache has the model's name two folders above.
    """
    if path.name == HUB_WEIGHTS:
        folder = path.absolute().parent
        snapshots = folder.parent
        return (snapshots.parent if snapshots.name == "snapshots" else folder).name.removeprefix("models--")
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "saved_models" else path.stem


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` names: a file itself, of a run's folder the best one, else the last.

    Raises :class:`InputError` where there is nothing at ``path``, or a folder that holds no checkpoint or
    several of which none is the best.
    """
    if not path.is_dir():
        if not path.exists():
            raise InputError(
                f"{path} does not exist; give a checkpoint (.pt), the folder of a run or of a saved model, "
                "a name of sprc.list_pretrained(), or one of the model hub (USER/NAME)"
            )
        return path
    saved = RunFolder(path).checkpoints
    folder = saved if saved.is_dir() else path
    chosen = [folder / name for name in (*BEST, HUB_WEIGHTS, PRETRAINED) if (folder / name).is_file()]
    if len(chosen) > 1:
        names = " and ".join(file.name for file in chosen)
        raise InputError(f"{folder} holds {names}; give the path of one of them")
    if chosen:
        return chosen[0]
    numbered = {
        int(found[1]): file
        for file in folder.glob("tuned_clip_*.pt")
        if (found := re.fullmatch(r"tuned_clip_(\d+)\.pt", file.name))
    }
    if not numbered:
        if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
            raise InputError(
                f"{folder} holds {pickles[0]} and no {HUB_WEIGHTS}; a pickle can run code, so of a "
                "folder safetensors alone are taken: ask for the model in that format"
            )
        names = ", ".join((*BEST, "tuned_clip_N.pt", HUB_WEIGHTS))
        raise InputError(
            f"{folder} holds no checkpoint ({names}); give the folder of a run that was trained with "
            "--save-training, or the path of a checkpoint"
        )
    return numbered[max(numbered)]
