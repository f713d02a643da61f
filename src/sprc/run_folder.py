"""A run's folder: its name, its JSON, its CSV files. Every write is atomic: the old file or the new one.

Of several ranks (torchrun) rank 0 alone writes; the others' calls do nothing.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from sprc.distributed import rank
from sprc.errors import InputError


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


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then put it in ``path``'s place.

    Raises ``OSError`` if that fails, a full disk for one; the file that was there is untouched.
    """
    if rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a failed write
        reason = " ".join(str(error).split())
        raise OSError(
            f"cannot write {path} ({reason}); free some space. What was there is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=4) + "\n").encode()))


def compact_json(value: Any) -> bytes:
    """``value`` as JSON without a space, for what is large and read by programs."""
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows under the first row's keys. Floats keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Add a row; the first one writes the keys before it. A killed run may leave its last line cut short."""
    if rank():
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
