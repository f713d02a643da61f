"""A run's folder: its name, its JSON, its CSV files. Every write is atomic: the old file or the new one.

Of several ranks (torchrun) rank 0 alone writes; the others' calls do nothing.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from sprc.distributed import rank
from sprc.errors import InputError

# What a failed write asks of the user. A reason that is not known is taken for a full disk.
ADVICE = {
    errno.ENOENT: "its folder is gone; make it again",
    errno.ENOTDIR: "its folder is a file; give another folder",
    errno.EACCES: "it is not writable for you; change that, or give another folder",
    errno.EPERM: "it is not writable for you; change that, or give another folder",
    errno.EROFS: "the disk is read-only; give a folder on another",
    errno.EIO: "the disk fails; check it",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
}
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_failure(path: Path, error: Exception, after: str) -> OSError:
    """What a failed write of ``path`` is told as, with the reason's ``errno``; ``after`` ends the message."""
    # torch.save makes a RuntimeError of a failed write.
    cause = error if isinstance(error, OSError) else error.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    failure = OSError(f"cannot write {path} ({reason}); {ADVICE.get(number, 'free some space')}. {after}")
    failure.errno = number
    return failure


@contextmanager
def named_write_errors(path: Path, after: str) -> Iterator[None]:
    """Tell an ``OSError`` in here as one of writing ``path``, see :func:`write_failure`."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error, after) from error


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

    Raises ``OSError`` with the reason's ``errno`` if that fails, a full disk for one; the file that was there
    is untouched.
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
    except (OSError, RuntimeError) as error:
        raise write_failure(path, error, "What was there is untouched") from error
    finally:
        with suppress(OSError):  # a read-only disk refuses to remove even what is not there
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=4) + "\n").encode()))


def compact_json(value: Any) -> bytes:
    """``value`` as JSON without a space, for what is large and read by programs."""
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, what one has not left empty. Floats keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Add a row; the first one writes the keys before it. A killed run may leave its last line cut short."""
    if rank():
        return
    new = not path.exists()
    with (
        named_write_errors(path, "The rows before are kept"),
        path.open("a", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
