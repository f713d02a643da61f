"""A run's folder and its name."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from sprc.errors import InputError

# What a run keeps of a benchmark's best epoch, and what `Retriever.save_pretrained` writes.
BEST = ("tuned_clip_arithmetic.pt", "tuned_clip_best.pt")
PRETRAINED = "model.pt"


def create_run_folder(models: Path, dataset: str, model_name: str) -> Path:
    """Make ``models/clip_finetuned_on_{cirr|fiq}_{name}_{time}`` and return it.

    Two runs that start in the same second get different folders.
    """
    short = {"CIRR": "cirr", "FashionIQ": "fiq"}[dataset]
    stem = f"clip_finetuned_on_{short}_{model_name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for attempt in range(1000):
        folder = models / (f"{stem}-{attempt}" if attempt else stem)
        try:
            (folder / "saved_models").mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot make the run folder {folder} ({error})") from error
        return folder
    raise InputError(f"{models}: a thousand runs were started in one second; wait and try again")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` names: a file itself, of a run's folder the best one, else the last.

    Raises :class:`InputError` where there is nothing at ``path``, or a folder that holds no checkpoint or
    several of which none is the best.
    """
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path} does not exist; give a checkpoint (.pt) or the folder of a run")
        return path
    saved = path / "saved_models"
    folder = saved if saved.is_dir() else path
    chosen = [folder / name for name in (*BEST, PRETRAINED) if (folder / name).is_file()]
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
        names = ", ".join((*BEST, "tuned_clip_N.pt", PRETRAINED))
        raise InputError(
            f"{folder} holds no checkpoint ({names}); give the folder of a run that was trained with "
            "--save-training, or the path of a checkpoint"
        )
    return numbered[max(numbered)]
