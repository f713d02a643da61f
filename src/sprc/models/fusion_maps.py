"""Where the fusion edits the reference, as maps: a value a patch of the vision transformer's grid, P x P.

[CLS], token 0, is left out.
"""

import torch
from torch import Tensor

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt


def patch_grid(values: Tensor, side: int) -> Tensor:
    """(B, N) values of image tokens, [CLS] first, to (B, side, side) float32 on the CPU without it."""
    return values[:, 1:].unflatten(1, (side, side)).float().cpu()


@torch.no_grad()
def fusion_maps(
    model: Blip2QformerCirAlignPrompt, image_embeds: Tensor, captions: list[str]
) -> tuple[Tensor | None, Tensor | None]:
    """The mean over channels of the gate, and of |fused - image|: (B, P, P) each, on the CPU.

    Where a strategy weights its tokens, the gate is the weighted one: 0 where a token is left as it is.

    Args:
        model: in eval mode.
        image_embeds: (B, N, D) from ``model.encode_image``.
        captions: B of them.

    Returns:
        None for what the model does not have: both without fusion, the gate in a strategy without one.
    """
    fusion = model.fuse(image_embeds, model.tokenize(captions))
    if fusion is None:
        return None, None
    side = model.config.num_patches
    change = patch_grid((fusion.fused - image_embeds).abs().mean(dim=2), side)
    if fusion.gate is None:
        return None, change
    # A strategy may have one gate for all channels or all tokens.
    gate = fusion.gate.expand_as(fusion.fused).mean(dim=2, keepdim=True)
    if fusion.weights is not None:
        gate = fusion.weights * gate
    return patch_grid(gate.squeeze(2), side), change
