"""A run's folder and its name."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sprc.errors import InputError


def create_run_folder(models: Path, short_name: str, model_name: str) -> Path:
    """Make ``models/clip_finetuned_on_{short_name}_{model_name}_{time}`` and return it.

    ``short_name`` is the benchmark's, "cirr" or "fiq". Two runs that start in the same second get different
    folders.
    """
    stem = f"clip_finetuned_on_{short_name}_{model_name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
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
