"""A model as a folder, as the model hub keeps it: what a checkpoint holds, in files that anyone can read.

    config.json        the model's name, backbone, config, preprocessing, epoch, and what its run was told
    model.safetensors  its parameters; a frozen vision transformer is left out unless it is asked for
    vocab.txt          its words, one a line, in the order of their ids
    README.md          a model card, see sprc.models.model_card

No file can run anything. `config.json` is written last, and has the SHA-256 of the two before it: what was
cut short, or is of two models, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sprc.errors import InputError
from sprc.files import hash_file, named_write_errors, write_atomically
from sprc.run_folder import HUB_WEIGHTS
from sprc.settings import ROOT

CONFIG, WEIGHTS, WORDS, CARD = "config.json", HUB_WEIGHTS, "vocab.txt", "README.md"
FILES = (WEIGHTS, WORDS, CARD, CONFIG)  # in the order in which they are put in place
FORMAT = 1
LIBRARY = "sprc-gated-fusion"
# Of a checkpoint's entries those that config.json has as they are.
ENTRIES = ("epoch", "model_config", "hyperparameters", "left_out")


class Saved(NamedTuple):
    """All that is saved of a model."""

    # See sprc.models.checkpoint.contents_of; `hyperparameters` has the preprocessing, too.
    contents: dict[str, Any]
    state: str  # the entry of the state dict in it
    run: dict[str, Any]  # see sprc.models.model_card.facts_of
    holds: str  # what kind of model it is, in words
    weights: Path | None  # where it was read


def library_version() -> str:
    """This library's version: the installed one's, in a checkout what its file says, else "unknown"."""
    try:
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, ValueError, KeyError):
        pass
    try:
        return metadata.version(LIBRARY)
    except metadata.PackageNotFoundError:
        return "unknown"


def config_of(saved: Saved, digests: dict[str, str]) -> dict[str, Any]:
    """What `config.json` says; ``digests`` are SHA-256 by file."""
    contents = saved.contents
    told = contents["hyperparameters"]
    return {
        "format": FORMAT,
        "library": LIBRARY,
        "library_version": library_version(),
        "model_type": told["blip_model_name"],
        "holds": saved.holds,
        "backbone": told["backbone"],
        "preprocessing": {
            "transform": told["transform"],
            "target_ratio": told["target_ratio"],
            "image_size": contents["model_config"]["image_size"],
        },
        **{name: contents[name] for name in ENTRIES},
        "run": saved.run,
        "sha256": digests,
    }


def write_parts(folder: Path, saved: Saved) -> None:
    """Write all but the model card into ``folder``, which is there."""
    from safetensors.torch import save_file

    # Tied weights are stored twice: safetensors knows no ties.
    seen: set[int] = set()
    tensors = {}
    for name, value in saved.contents[saved.state].items():
        start = value.data_ptr()
        tensors[name] = value.detach().cpu().clone() if start in seen else value.detach().cpu().contiguous()
        seen.add(start)
    with named_write_errors(folder / WEIGHTS, "What was there is untouched"):
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except Exception as error:  # safetensors tells a full disk as an error of its own kind
            if isinstance(error, OSError) or "os error" not in str(error).lower():
                raise
            raise OSError(str(error)) from error
    words = "".join(f"{word}\n" for word in saved.contents["vocabulary"])
    write_atomically(folder / WORDS, lambda file: file.write(words.encode()))
    # safetensors writes for its owner alone; this is as every other file is.
    os.chmod(folder / WEIGHTS, (folder / WORDS).stat().st_mode)
    digests = {name: hash_file(folder / name, hashlib.sha256()) for name in (WEIGHTS, WORDS)}
    text = json.dumps(config_of(saved, digests), indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))


def staged(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside ``folder`` to make its files in; what is there stays whole until :func:`put_in_place`.

    Raises :class:`InputError` where none can be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".being_saved.", dir=folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); give another folder") from error


def put_in_place(made: Path, folder: Path) -> None:
    """Move the files of a model from ``made`` to ``folder``, `config.json` last.

    A kill in between leaves weights that are not those of the config, which loading refuses.
    """
    with named_write_errors(folder, "Save it again"):
        for name in FILES:
            if (made / name).exists():
                os.replace(made / name, folder / name)


def read_folder(weights: Path) -> dict[str, Any]:
    """What a checkpoint would hold, from `model.safetensors` and the files beside it.

    Its entries' kinds are :func:`sprc.models.checkpoint.read_contents`'s to look at. The state dict is under
    `state`, and `run` and `holds` are what the config says of the run.

    Raises:
        InputError: a file is missing, broken, or not the one that `config.json` was written with.
    """
    folder = weights.parent
    again = "save the model again, or fetch it again"
    config = read_config(folder)
    digests = config.get("sha256")
    if not isinstance(digests, dict):
        raise InputError(f"{folder / CONFIG} has no sha256 of the files beside it; {again}")
    for name in (WEIGHTS, WORDS):
        try:
            found = hash_file(folder / name, hashlib.sha256())
        except FileNotFoundError as error:
            raise InputError(f"{folder / name} is missing; {again}") from error
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror}); {again}") from error
        if found != digests.get(name):
            raise InputError(
                f"{folder / name} is not the file that {CONFIG} beside it was written with: it was cut "
                f"short, damaged or replaced; {again}"
            )
    from safetensors.torch import load_file

    try:
        state = load_file(weights)
        words = (folder / WORDS).read_bytes().decode().split("\n")[:-1]
    except Exception as error:  # broken bytes raise safetensors' own
        raise InputError(f"{weights} cannot be read as safetensors; {again}") from error
    entries = {name: config[name] for name in ENTRIES if name in config}
    beside = {"run": config.get("run", {}), "holds": str(config.get("holds", "a model"))}
    return {**entries, "vocabulary": words, "state": state, **beside}


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`; :class:`InputError` where it is none of this project's."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing: the saving of the model was cut short, or {WEIGHTS} is another project's; "
            "save the model again, or give the folder that sprc wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON; save the model again, or fetch it again") from error
    if not isinstance(config, dict) or "model_config" not in config:
        raise InputError(
            f"{path} is not this project's: it has no model_config; give a folder that save_pretrained or "
            "export_model.py wrote"
        )
    if config.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {config.get('format')}, and this version reads {FORMAT}; install a newer sprc"
        )
    return config
