"""What a state dict tells of the model that it belongs to.

SPRC's checkpoints are a state dict alone. Its shapes give the widths and depths; but two fusions with the
same parameters may compute different things (``pool``, ``fusion_text``). So with fusion on the state dict
carries the whole config, as one more entry, ``SWITCHES``. Plain SPRC's is the published format, no more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sprc.config import ModelConfig
from sprc.errors import InputError
from sprc.models.tokenizer import WordPiece

FUSION = "gated_fusion."
SWITCHES = "gated_fusion.switches._extra_state"
VIT = "visual_encoder."

# Fields of ModelConfig that act in training alone: the score of a checkpoint does not depend on them.
TRAINING_ONLY = ("freeze_vit", "dropout", "fusion_dropout", "initializer_range", "alpha_init", "fusion_start")

WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
LAYERS = "Qformer.bert.encoder.layer."
# Where a state dict shows a field of ModelConfig: an entry and an axis of its shape.
SHAPES = {
    "vocab_size": (WORDS, 0),
    "hidden_size": (WORDS, 1),
    "max_positions": ("Qformer.bert.embeddings.position_embeddings.weight", 0),
    "intermediate_size": (f"{LAYERS}0.intermediate.dense.weight", 0),
    "num_query_tokens": ("query_tokens", 1),
    "embed_dim": ("vision_proj.weight", 0),
    "vit_width": ("ln_vision.weight", 0),
}
# Of each vision transformer: its blocks, its patches' convolution, its positions and their axis.
VITS = (
    (f"{VIT}blocks.", f"{VIT}patch_embed.proj.weight", f"{VIT}pos_embed", 1),
    (f"{VIT}transformer.resblocks.", f"{VIT}conv1.weight", f"{VIT}positional_embedding", 0),
)


class Switches(nn.Module):
    """The config in the state dict: a JSON text as bytes, (length,) uint8. No parameter and no buffer.

    Loading a state dict leaves it as it is: whoever loads one asks :func:`differences` first.
    """

    def __init__(self, config: ModelConfig, tokenizer: WordPiece) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer

    def get_extra_state(self) -> Tensor:
        """What goes into the state dict."""
        told = {"model_config": asdict(self.config), "vocabulary": vocabulary_digest(self.tokenizer)}
        return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the text describes this model, not the file."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())  # a file may lack it
        super()._load_from_state_dict(state_dict, prefix, *others)


def vocabulary_digest(tokenizer: WordPiece) -> str:
    """A hash of the words in the order of their ids."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return hashlib.blake2b("\n".join(words).encode(), digest_size=8).hexdigest()


def read_switches(state: dict[str, Tensor]) -> tuple[dict[str, Any], str | None]:
    """The config that a state dict carries and its :func:`vocabulary_digest`; ({}, None) where it has none.

    Raises :class:`InputError` where the entry is not what :class:`Switches` writes.
    """
    raw = state.get(SWITCHES)
    if raw is None:
        return {}, None
    try:
        if raw.dtype != torch.uint8 or raw.dim() != 1:
            raise ValueError
        told = json.loads(bytes(raw.tolist()))
        config, digest = told["model_config"], told["vocabulary"]
        if not isinstance(config, dict) or not isinstance(digest, str):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"the checkpoint's entry {SWITCHES} cannot be read; it is damaged") from error
    return config, digest


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """The fields of :class:`ModelConfig` that the shapes of a state dict give."""
    sizes: dict[str, int] = {}
    for field, (key, axis) in SHAPES.items():
        if key in state and state[key].dim() > axis:
            sizes[field] = state[key].shape[axis]
    sizes["num_layers"] = layers = depth(state, LAYERS)
    crossing = (i for i in range(1, layers) if f"{LAYERS}{i}.crossattention.self.key.weight" in state)
    sizes["cross_attention_every"] = next(crossing, 0)
    for blocks, patches, positions, axis in VITS:
        if patches not in state or positions not in state:
            continue
        if state[patches].dim() == 4 and state[positions].dim() > axis:
            patch = state[patches].shape[-1]
            side = math.isqrt(state[positions].shape[axis])  # of n^2 + 1 positions
            sizes |= {"vit_depth": depth(state, blocks), "patch_size": patch, "image_size": side * patch}
    return {field: value for field, value in sizes.items() if value}


def depth(state: dict[str, Tensor], blocks: str) -> int:
    """How many blocks the names of a state dict count under a prefix."""
    return len({key[len(blocks) :].split(".")[0] for key in state if key.startswith(blocks)})


def differences(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Any]:
    """Fields in which the model of a state dict scores otherwise than one of ``config``, with its values.

    Raises :class:`InputError`, see :func:`read_switches`.
    """
    has_fusion = any(key.startswith(FUSION) for key in state)
    told = {**sizes_of(state), **read_switches(state)[0], "use_gated_fusion": has_fusion}
    return {
        field: value
        for field, value in told.items()
        if field not in TRAINING_ONLY and getattr(config, field, None) != value
    }


def mismatches(own: dict[str, Tensor], state: dict[str, Tensor], may_lack: Collection[str]) -> str:
    """Where a state dict does not fit a model's ``own``, in words; empty where it does.

    It may lack ``may_lack``; `position_ids` and ``SWITCHES`` may be in either alone.
    """
    free = {key for key in {*own, *state} if key == SWITCHES or key.endswith("position_ids")}
    shared = (set(own) & set(state)) - {SWITCHES}
    lists = {
        "missing": set(own) - set(state) - set(may_lack) - free,
        "unexpected": set(state) - set(own) - free,
        "of another shape": {key for key in shared if own[key].shape != state[key].shape},
    }
    return "; ".join(
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:10])}" for what, keys in lists.items() if keys
    )
