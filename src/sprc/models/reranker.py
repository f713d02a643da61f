"""A re-ranker and its first stage: how it starts from one, and how it is loaded beside one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sprc.config import MODEL_SWITCHES, RERANKER, ModelConfig
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.models.checkpoint import filled, fingerprint, read_contents, read_vocabulary
from sprc.models.model_path import find_model
from sprc.models.switches import FUSION, SWITCHES, VIT


def start_reranker(first_stage: Blip2QformerCirAlignPrompt) -> Blip2QformerCirRerank:
    """A re-ranker that has the first stage's weights, and the very vision transformer; on the CPU.

    Raises :class:`InputError` where that learns.
    """
    config = replace(first_stage.config, use_gated_fusion=False)
    model = Blip2QformerCirRerank(config, first_stage.tokenizer)
    own = model.state_dict()
    found = {name: value for name, value in first_stage.state_dict().items() if not name.startswith(FUSION)}
    model.load_state_dict({name: found[name] for name in own})
    model.visual_encoder = first_stage.visual_encoder
    return model


def digest_of_weights(first_stage: Blip2QformerCirAlignPrompt) -> str:
    """What tells a first stage from all others: of its switches, and all weights but the frozen ones'."""
    state = first_stage.state_dict()
    weights = {k: value for k, value in state.items() if not k.startswith(VIT) and k != SWITCHES}
    # Those at their default are left out: a later version may know more of them.
    usual = ModelConfig()
    own = {k: getattr(first_stage.config, k) for k in MODEL_SWITCHES}
    unusual = {k: value for k, value in own.items() if value != getattr(usual, k)}
    words = json.dumps([fingerprint(weights), unusual], sort_keys=True)
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def load_reranker(
    path: Path, first_stage: Blip2QformerCirAlignPrompt, *, any_first_stage: bool = False
) -> Blip2QformerCirRerank:
    """The re-ranker of a checkpoint, in eval mode on the CPU; ``first_stage`` is what it shall re-rank for.

    Raises:
        InputError: the file cannot be loaded, see :func:`sprc.models.checkpoint.load_checkpoint`; it holds no
            re-ranker; one whose images or prompts are others than the first stage's; or, unless
            ``any_first_stage``, one of another first stage.
    """
    path = find_model(path)
    contents = read_contents(path)
    told = contents.get("hyperparameters", {})
    if told.get("blip_model_name") != RERANKER:
        raise InputError(
            f"--rerank {path} holds {told.get('blip_model_name', 'an SPRC checkpoint')} and no re-ranker; "
            f"train one with --blip-model-name {RERANKER}"
        )
    config = ModelConfig.from_dict(contents["model_config"], str(path))
    own, other = config, first_stage.config
    if (own.num_query_tokens, own.hidden_size) != (other.num_query_tokens, other.hidden_size):
        raise InputError(
            f"--rerank {path} reads {own.num_query_tokens} vectors of {own.hidden_size}, and the first stage "
            f"makes {other.num_query_tokens} of {other.hidden_size}; give its own"
        )
    if not any_first_stage and told.get("first_stage") != digest_of_weights(first_stage):
        raise InputError(
            f"--rerank {path} is of another first stage, {told.get('first_stage_name')}; give that as "
            "--model-path, or add --rerank-any"
        )
    tokenizer = read_vocabulary(contents["vocabulary"], path)
    model = filled(Blip2QformerCirRerank, config, tokenizer, contents, path)
    if not same_weights(model.visual_encoder, first_stage.visual_encoder):
        raise InputError(f"--rerank {path} has another vision transformer than --model-path; give its own")
    model.visual_encoder = first_stage.visual_encoder  # once in memory, and once computed
    return model.eval()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, whatever type and device they are on."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.shape == second[name].shape and torch.equal(value.half().cpu(), second[name].half().cpu())
        for name, value in first.items()
    )
