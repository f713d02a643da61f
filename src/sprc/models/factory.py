"""Build a model by name: its classes from the config, its weights from the backbone's files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sprc.config import ModelConfig, read_backbone
from sprc.distributed import local_main_first, local_rank, rank, world_size
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.tokenizer import bert_tokenizer, make_vocabulary, tokenizer_from_vocabulary
from sprc.models.vision import resize_positions

MODELS = {"blip2_cir_align_prompt": Blip2QformerCirAlignPrompt}

# Parameters that no backbone provides: SPRC's prompts and the fusion start at random.
NEW_PARAMETERS = ("prompt_tokens", "gated_fusion.")


def model_class(name: str) -> type[Blip2QformerCirAlignPrompt]:
    """The class of ``--blip-model-name``; an unknown name raises :class:`InputError`."""
    if name not in MODELS:
        raise InputError(f"--blip-model-name {name!r} is unknown; choose from {', '.join(MODELS)}")
    return MODELS[name]


def create_model(
    cls: type[Blip2QformerCirAlignPrompt], backbone: str, *, captions: Iterable[str] = (), **switches: Any
) -> Blip2QformerCirAlignPrompt:
    """A model to train, with its backbone's weights.

    Args:
        cls: a class of ``MODELS``, see :func:`model_class`.
        backbone: one of ``sprc.config.BACKBONES``.
        captions: where the vocabulary comes from for a backbone that has none of its own (`tiny`).
        switches: fields of :class:`ModelConfig` that the user sets, over the backbone's own.

    Raises:
        InputError: an unknown backbone, a switch that does not fit, weights that cannot be had.
    """
    recipe = read_backbone(backbone)
    weights = recipe.get("weights")
    arguments = {**recipe["model"], **switches}
    if weights:
        config = ModelConfig.from_dict(arguments, f"backbone {backbone}")
        model = cls(config, bert_tokenizer())
        load_backbone(model, weights)
    else:
        tokenizer = tokenizer_from_vocabulary(make_vocabulary(captions))
        arguments["vocab_size"] = len(tokenizer)
        model = cls(ModelConfig.from_dict(arguments, f"backbone {backbone}"), tokenizer)
    return model


def choose_device(name: str | None) -> torch.device:
    """``--device``, by default a GPU if there is one; one that cannot be used raises :class:`InputError`.

    Of several ranks each takes the GPU of its own number on its machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(
                f"--device {name!r} would be that of all ranks; give cuda, and each takes its own"
            )
        if local_rank() >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local_rank()} has no GPU: this machine has {torch.cuda.device_count()}; give "
                "torchrun --nproc-per-node as many, or --device cpu"
            )
        name = f"cuda:{local_rank()}"
        torch.cuda.set_device(name)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name!r} cannot be used ({reason}); try cpu or cuda") from error


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move to ``device``; on a GPU a frozen ViT keeps its large weights in float16, at half the memory."""
    if device.type == "cuda":
        halve_frozen_vit(model)
    return model.to(device)


def halve_frozen_vit(model: nn.Module) -> None:
    """Keep the matrices of a frozen ViT in float16, as LAVIS does; encode_image runs it under autocast."""
    if model.config.freeze_vit:
        for module in model.visual_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.half()


def load_backbone(model: Blip2QformerCirAlignPrompt, weights: dict[str, str]) -> None:
    """Fill ``model`` from the files that a backbone's YAML names, fetched once and cached by torch.

    A parameter that neither file holds, or that has another shape, raises :class:`InputError`. Entries
    for parts that BLIP-2 leaves out of the vision transformer are counted in one printed line.
    """
    found = backbone_weights(model.config, weights)
    own = model.state_dict()
    state = {
        key: value if key.startswith(NEW_PARAMETERS) or key.endswith("position_ids") else found.get(key)
        for key, value in own.items()
    }
    missing = [key for key, value in state.items() if value is None]
    wrong = [key for key, value in state.items() if value is not None and value.shape != own[key].shape]
    if missing or wrong:
        raise InputError(
            f"{weights['blip2']} does not fit this model: {len(missing)} parameters missing {missing[:5]}, "
            f"{len(wrong)} of another shape {wrong[:5]}; check the backbone and --image-size"
        )
    if unused := sorted(set(found) - set(own)):
        print(f"backbone weights: {len(unused)} entries belong to parts that this model leaves out")
    model.load_state_dict(state)


def backbone_weights(
    config: ModelConfig, weights: dict[str, str], *, vit_only: bool = False
) -> dict[str, Tensor]:
    """What a backbone's files hold, under the model's names, positions resampled to ``config.image_size``.

    With ``vit_only`` a file that holds no vision transformer is not fetched.
    """
    found: dict[str, Tensor] = {}
    if "vit" in weights:
        found |= {f"visual_encoder.{key}": value for key, value in _fetch(weights["vit"]).items()}
    if not (vit_only and found):
        found |= _fetch(weights["blip2"])["model"]  # its own ViT, if any, is the one it was trained with
    eva = config.vit == "eva"
    positions = "visual_encoder.pos_embed" if eva else "visual_encoder.positional_embedding"
    if positions in found:
        grid = found[positions].squeeze(0)  # EVA's has a batch axis of one, CLIP's has none
        grid = resize_positions(grid, config.num_patches, align_corners=not eva)
        found[positions] = grid[None] if eva else grid
    return found


def _fetch(url: str) -> dict[str, Any]:
    with local_main_first():
        return _fetch_now(url)


def _fetch_now(url: str) -> dict[str, Any]:
    try:
        path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=rank() == 0)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot fetch {url} ({error}); download it by hand into {torch.hub.get_dir()}/checkpoints"
        ) from error
