"""Checkpoints: SPRC's two entries, `epoch` and the state dict, and what is needed to rebuild the model."""

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sprc.config import ModelConfig
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.tokenizer import tokenizer_from_vocabulary
from sprc.run_folder import write_atomically

STATE = Blip2QformerCirAlignPrompt.__name__


class Checkpoint(NamedTuple):
    """A loaded checkpoint: the model in eval mode on the CPU, and what the run was told."""

    model: Blip2QformerCirAlignPrompt
    epoch: int
    hyperparameters: dict[str, Any]


def save_checkpoint(
    path: Path, model: Blip2QformerCirAlignPrompt, epoch: int, hyperparameters: dict[str, Any]
) -> None:
    """Write the model with all that rebuilds it: config, vocabulary and the run's hyperparameters."""
    tokenizer = model.tokenizer
    contents = {
        "epoch": epoch,
        STATE: model.state_dict(),
        "model_config": asdict(model.config),
        "vocabulary": tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size))),
        "hyperparameters": hyperparameters,
    }
    write_atomically(path, lambda file: torch.save(contents, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Rebuild the model that :func:`save_checkpoint` wrote, with no flag.

    Raises :class:`InputError` for a file that is missing, is no checkpoint, or is one of another model.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give the path of a checkpoint (.pt)") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} cannot be loaded safely: it is no checkpoint, is cut short, or holds more than tensors"
        ) from error
    needed = (STATE, "epoch", "model_config", "vocabulary", "hyperparameters")
    if not isinstance(contents, dict) or (missing := [key for key in needed if key not in contents]):
        keys = ", ".join(missing) if isinstance(contents, dict) else "a dictionary"
        raise InputError(f"{path} is not a checkpoint of this model: it lacks {keys}")
    config = ModelConfig.from_dict(contents["model_config"], str(path))
    model = Blip2QformerCirAlignPrompt(config, tokenizer_from_vocabulary(contents["vocabulary"]))
    try:
        model.load_state_dict(contents[STATE])
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise InputError(f"{path} holds parameters of another model: {details[:400]}") from error
    return Checkpoint(model.eval(), contents["epoch"], contents["hyperparameters"])
