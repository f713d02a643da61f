"""The model hub: names, what is fetched from it, and what its errors ask of the user.

huggingface_hub does the fetching. It is imported where it is first needed: nothing else wants it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sprc.distributed import local_main_first
from sprc.errors import InputError
from sprc.models.hub_folder import CONFIG, WEIGHTS, WORDS

NAME = re.compile(r"[\w.-]+/[\w.-]+")
# That raise what a network does, under whatever number: httpx2 is one.
LIBRARIES = ("requests", "urllib", "httpx", "httpcore", "http", "h")


def is_hub_name(name: str) -> bool:
    """Whether a word can only be a name of the hub, USER/NAME: there is no folder USER here."""
    path = Path(name)
    return (
        NAME.fullmatch(name) is not None
        and path.suffix not in (".pt", ".pth", ".bin", ".safetensors")
        and not path.parent.exists()
    )


def fetch(name: str, revision: str | None = None) -> Path:
    """Where a model's weights are on this machine, fetched if need be, with the files beside them.

    Args:
        name: USER/NAME.
        revision: a branch, a tag or a commit; by default the newest of `main`.

    Raises:
        InputError: it cannot be had, or holds no weights as safetensors.
    """
    with explained(name, revision), local_main_first():
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(name, CONFIG, revision=revision))
        # Of the same commit, should another be pushed meanwhile.
        commit = config.parent.name
        hf_hub_download(name, WORDS, revision=commit)
        return Path(hf_hub_download(name, WEIGHTS, revision=commit))


@contextmanager
def explained(name: str, revision: str | None = None, doing: str = "fetched") -> Iterator[None]:
    """Make one line of what talking to the hub about ``name`` can raise, an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"{name} is a name of the model hub, which needs the package huggingface_hub: pip install "
            "huggingface_hub"
        ) from error
    except Exception as error:
        if (told := explanation(error, name, revision, doing)) is None:
            raise
        raise InputError(told) from error


def explanation(error: Exception, name: str, revision: str | None, doing: str) -> str | None:
    """What an error of the hub asks of the user; None where it is none of the hub's."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # It is not in the cache either: why it was not fetched is what matters.
        return explanation(error.__cause__, name, revision, doing)
    cannot, where = f"{name} cannot be {doing}", constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is no name of the model hub ({first_line(error)}); give USER/NAME"
    if constants.HF_HUB_OFFLINE and isinstance(
        error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    ):
        kept = f"it is not in {constants.HF_HUB_CACHE}" if doing == "fetched" else "there is no network then"
        return f"{cannot}: HF_HUB_OFFLINE is set and {kept}; unset it, or give a folder"
    if isinstance(error, errors.GatedRepoError):
        return f"{cannot}: its owner asks you to accept terms; do so at {where}/{name}, then {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{cannot}: it has no revision {revision!r}; give a branch, a tag or a commit of {where}/{name}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{cannot}: {where} has no such model, or it is private; correct the name, or {token} as who may "
            "see it"
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        missing = next((file for file in (CONFIG, WORDS, WEIGHTS) if file in str(error)), "a file")
        return (
            f"{cannot}: it has no {missing}; safetensors alone are taken, as save_pretrained or "
            "export_model.py writes them (a .bin or another pickle can run code)"
        )
    if status == 401:
        return f"{cannot}: {where} does not know the token; {token} with one that is valid"
    if status == 403:
        return f"{cannot}: the token may not do that; {token} with one that may (for an upload: write)"
    if status is not None:
        return f"{cannot}: {where} answered {status} ({first_line(error)}); try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{cannot}: the disk of {constants.HF_HUB_CACHE} is full; free some space, or set HF_HOME"
    module = type(error).__module__.split(".")[0].rstrip("0123456789")
    cut = "Consistency check failed" in str(error)  # a file that came down too short
    if cut or module in LIBRARIES or isinstance(error, (OSError, errors.LocalEntryNotFoundError)):
        return (
            f"{cannot}: {where} cannot be reached, or the connection was cut ({type(error).__name__}); run "
            "the same again, and it goes on, or give a folder"
        )
    return None


def first_line(error: Any) -> str:
    """The beginning of an error's text, which may have many lines."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}..."
