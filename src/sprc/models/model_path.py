"""What ``--model-path`` may be: a file, a folder, a published checkpoint's name, or a name of the model hub."""

from __future__ import annotations

from pathlib import Path

from sprc.errors import InputError
from sprc.models.hub import fetch, is_hub_name
from sprc.models.published import published_as, require_published
from sprc.run_folder import find_checkpoint


def find_model(given: str | Path, revision: str | None = None) -> Path:
    """The file of a model's parameters: a checkpoint, or a `model.safetensors` with its config beside it.

    Args:
        given: a file; the folder of a run, of which the best checkpoint is taken, else the last; the folder
            of a saved model; a name of :func:`sprc.list_pretrained`; or USER/NAME of the model hub. What lies on
            the disk under the name comes first.
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
