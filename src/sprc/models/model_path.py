"""What ``--model-path`` may be: a file, a folder, the name of a published checkpoint or of a hub's model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sprc.errors import InputError
from sprc.models.hub import fetch, is_hub_name
from sprc.models.published import published_as, require_published
from sprc.run_folder import find_checkpoint

S = TypeVar("S", bound=Any)


def find_model(given: str | Path, revision: str | None = None) -> Path:
    """The file of a model's parameters: a checkpoint, or a `model.safetensors` with its config beside it.

    Args:
        given: a file; the folder of a run, of which the best checkpoint is taken, else the last; the folder
            of a saved model; a name of :func:`sprc.list_pretrained`; or USER/NAME of the model hub. What lies
            on the disk under the name comes first.
        revision: of the model hub's.

    Raises:
        InputError: there is none, or it cannot be had.
    """
    path = Path(given)
    name, here = path.as_posix(), path.exists()
    if revision is not None and (here or not is_hub_name(name)):
        raise InputError(f"revision {revision!r}: {given} is no name of the model hub; leave it out")
    if not here:
        if (published := published_as(name)) is not None:
            return require_published(published)
        if is_hub_name(name):
            return fetch(name, revision)
    return find_checkpoint(path)


def named_model(path: Path) -> Path:
    """The same for settings: a file, there or not, stays as it is; see :func:`find_model` for all others."""
    if path.is_file() or path.suffix in (".pt", ".pth"):
        return path
    known = published_as(path.as_posix()) is not None or is_hub_name(path.as_posix())
    return find_model(path) if path.is_dir() or known else path


def folder_beside(given: Path, found: Path) -> Path:
    """Where what is made of a model goes: beside its file, or of one that was named here, where we are.

    ``given`` is what the user gave, ``found`` the file of it: of the model hub's it lies in the hub's cache.
    """
    return found.parent if given.exists() else Path()


def with_files(settings: S) -> S:
    """Settings with the files of the models that they name, see :func:`named_model`."""
    given = {name: getattr(settings, name, None) for name in ("model_path", "rerank", "off_model_path")}
    found = {name: named_model(path) for name, path in given.items() if path is not None}
    return replace(settings, **found)
