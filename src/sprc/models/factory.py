"""Build a model by name: its classes from the config, its weights from the backbone's files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sprc.config import RERANKER, ModelConfig, read_backbone
from sprc.distributed import local_main_first, local_rank
from sprc.errors import InputError
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.models.shipped import shipped_bytes
from sprc.models.tokenizer import WordPiece, bert_tokenizer
from sprc.models.vision import resize_positions
from sprc.models.weights import read_shipped_weights, read_weights, state_of

M = TypeVar("M", bound=Blip2Qformer)

MODELS: dict[str, type[Blip2Qformer]] = {
    "blip2_cir_align_prompt": Blip2QformerCirAlignPrompt,
    RERANKER: Blip2QformerCirRerank,
}

# Parameters that no backbone provides: SPRC's prompts and the fusion start at random.
NEW_PARAMETERS = ("prompt_tokens", "gated_fusion.")


def model_class(name: str) -> type[Blip2Qformer]:
    """The class of ``--blip-model-name``; an unknown name raises :class:`InputError`."""
    if name not in MODELS:
        raise InputError(f"--blip-model-name {name!r} is unknown; choose from {', '.join(MODELS)}")
    return MODELS[name]


def create_model(cls: type[M], backbone: str, *, vocab: Path | None = None, **switches: Any) -> M:
    """A model to train, with its backbone's words and weights.

    Args:
        cls: a class of ``MODELS``, see :func:`model_class`.
        backbone: one of ``sprc.config.BACKBONES``.
        vocab: BERT's `vocab.txt`, see :func:`sprc.models.tokenizer.bert_tokenizer`; not for `tiny`.
        switches: fields of :class:`ModelConfig` that the user sets, over the backbone's own.

    Raises:
        InputError: an unknown backbone, a switch that does not fit, weights or words that cannot be had.
    """
    recipe = read_backbone(backbone)
    config = ModelConfig.from_dict({**recipe["model"], **switches}, f"backbone {backbone}")
    model = cls(config, tokenizer_of(backbone, vocab))
    load_backbone(model, recipe["weights"])
    return model


def tokenizer_of(backbone: str, vocab: Path | None = None) -> WordPiece:
    """The tokenizer of a backbone: its own words where its YAML names a file of them, else BERT's.

    Args:
        backbone: one of ``sprc.config.BACKBONES``.
        vocab: see :func:`sprc.models.tokenizer.bert_tokenizer`.

    Raises:
        InputError: the words cannot be had, or ``vocab`` is given to a backbone that has its own.
    """
    own = read_backbone(backbone).get("vocabulary")
    if own is None:
        return bert_tokenizer(vocab)
    if vocab is not None:
        raise InputError(f"--vocab {vocab}: backbone {backbone} has words of its own; leave it out")
    return WordPiece(shipped_bytes(own["file"], own["sha256"]).decode().split())


def load_backbone(model: Blip2Qformer, weights: dict[str, str]) -> None:
    """Fill ``model`` from the files that a backbone's YAML names: `blip2`, and `vit` where that lacks it.

    What has an address is fetched once and cached by torch. What has none is a file beside the YAML, which
    gives its `sha256`.
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
    vit, blip2 = weights.get("vit"), weights["blip2"]
    if vit:
        contents = _read(vit, None)
        found |= {f"visual_encoder.{key}": value for key, value in state_of(contents, vit).items()}
    if not (vit_only and found):
        # Its own ViT, if any, is the one it was trained with.
        found |= state_of(_read(blip2, weights.get("sha256")), blip2, "model")
    eva = config.vit == "eva"
    positions = "visual_encoder.pos_embed" if eva else "visual_encoder.positional_embedding"
    if positions in found:
        grid = found[positions].squeeze(0)  # EVA's has a batch axis of one, CLIP's has none
        if grid.dim() != 2 or len(grid) < 2 or math.isqrt(len(grid) - 1) ** 2 != len(grid) - 1:
            shape = tuple(found[positions].shape)
            raise InputError(f"{vit or blip2}: {positions} has shape {shape}, and is no square of patches")
        grid = resize_positions(grid, config.num_patches, align_corners=not eva)
        found[positions] = grid[None] if eva else grid
    return found


def _read(address: str, sha256: str | None) -> dict[str, Any]:
    if sha256 is not None:
        return read_shipped_weights(address, sha256)
    with local_main_first():
        return read_weights(address, verify=local_rank() == 0)
