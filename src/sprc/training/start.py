"""The model to train: from its backbone's weights or a checkpoint's, and what of it learns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from sprc.errors import InputError
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import load_checkpoint, start_model
from sprc.models.reranker import digest_of_weights, start_reranker
from sprc.run_folder import name_of_checkpoint
from sprc.training.negatives import choose_learning
from sprc.training.optimisation import TrainingConfig, by_prefix
from sprc.training.settings import TrainingSettings

FUSION_PARAMETERS = "gated_fusion."  # their names start so
FUSION_IS_OFF = "fusion is off; leave the flag out"


class Start(NamedTuple):
    """The model to train, on the CPU."""

    model: Blip2Qformer
    first_stage: Blip2QformerCirAlignPrompt | None = None  # of a re-ranker, in eval mode

    def told(self, settings: TrainingSettings) -> dict[str, str]:
        """What a re-ranker's checkpoint says of its first stage."""
        if self.first_stage is None or settings.model_path is None:
            return {}
        name = name_of_checkpoint(settings.model_path)
        return {"first_stage": digest_of_weights(self.first_stage), "first_stage_name": name}


def start(settings: TrainingSettings, config: TrainingConfig, recorded: Mapping[str, Any] | None) -> Start:
    """The model that the settings name, what does not learn without gradient; ``seed`` draws what is new.

    Args:
        settings: complete.
        config: of the loop.
        recorded: the model's config of the run that goes on.

    Raises:
        InputError: a checkpoint or a backbone cannot be loaded, or a flag has nothing to act on.
    """
    torch.manual_seed(config.seed)
    if settings.reranks:
        found = start_second_stage(settings)
    else:
        model = start_model(
            settings.blip_model_name,
            settings.backbone,
            model_path=settings.model_path,
            vocab=settings.vocab,
            switches=settings.switches,
            recorded=recorded,
        )
        if model.gated_fusion is None:
            refuse_fusion_flags(settings, FUSION_IS_OFF)
        model.contrast = settings.contrast
        choose_learning(model, settings.train)
        found = Start(model)
    for prefix, parameters in by_prefix(found.model, config.other_rates).items():
        if prefix:
            count = sum(parameter.numel() for parameter in parameters)
            print(f"{prefix}*, {count:,} weights: learning rate {config.other_rates[prefix]:g}", flush=True)
    return found


def start_second_stage(settings: TrainingSettings) -> Start:
    """A re-ranker beside its first stage, which is the checkpoint of ``--model-path``."""
    require_first_stage(settings)
    checkpoint = load_checkpoint(
        cast(Path, settings.model_path), backbone=settings.backbone, vocab=settings.vocab
    )
    for line in checkpoint.told():
        print(f"first stage: {line}", flush=True)
    for name in ("transform", "target_ratio"):
        given, own = getattr(settings, name), checkpoint.hyperparameters.get(name)
        if own is not None and given != own:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {given}: the first stage was trained with {own}; give {flag} {own}")
    return Start(start_reranker(checkpoint.model), checkpoint.model)


def require_first_stage(settings: TrainingSettings) -> None:
    """Raise :class:`InputError` where a re-ranker is to be trained without a first stage."""
    if settings.reranks and settings.model_path is None:
        raise InputError(
            f"--blip-model-name {settings.blip_model_name} re-ranks what a first stage finds; give its "
            "checkpoint as --model-path"
        )


def refuse_fusion_flags(settings: TrainingSettings, why: str) -> None:
    """Raise :class:`InputError` for a flag of the fusion's training, where no fusion learns."""
    for flag, value in (("--fusion-lr", settings.fusion_lr), ("--warmup-fusion", settings.warmup_fusion)):
        if value:
            raise InputError(f"{flag} {value}: {why}")
