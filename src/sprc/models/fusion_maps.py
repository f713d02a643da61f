"""Where the fusion edits the reference, as maps: a value a patch of the vision transformer's grid, P x P.

[CLS] of the image, token 0, is left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.token_fusion import CrossFusion


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


class WordMaps(NamedTuple):
    """Which word of a caption edits which patch, told in one way or two. All on the CPU."""

    words: list[str]  # W, as the model reads them: in lower case, [UNK] for one that it does not know
    # (W, P, P): mean over channels of |fused - fused by the caption without the word|. A word that others
    # repeat may have little of its own, and these need not sum to the change.
    left_out: Tensor
    # (W + 1, P, P), of `cross` alone: a patch's change, mean |fused - image|, shared out among the words by
    # its attention to them, the mean of the heads. The last is the part of [CLS] and [SEP]; all of them
    # together sum to the change.
    attention: Tensor | None


def why_no_word_maps(model: Blip2QformerCirAlignPrompt) -> str | None:
    """What makes maps of words meaningless for this model with fusion, as half a sentence; else None."""
    if model.config.fusion_strategy == "additive":
        return "additive moves all tokens by the same step, so no word has a place in the picture"
    return None


@torch.no_grad()
def word_maps(model: Blip2QformerCirAlignPrompt, image_embeds: Tensor, caption: str) -> WordMaps:
    """The maps of each word of a caption.

    Without a word, the model reads the caption's other word pieces, those that it was cut to, one after
    another: the words behind it move up, and a mean over words is one of fewer.

    Args:
        model: in eval mode, with a fusion for which :func:`why_no_word_maps` gives None.
        image_embeds: (1, N, D) from ``model.encode_image``.
        caption: as for ``model.tokenize``.
    """
    ids = model.caption_ids[caption]
    words = places_of_words(model, ids)
    shortened = [[ids[i] for i in range(len(ids)) if i not in places] for _, places in words]
    text, side = model.look_up([ids, *shortened]), model.config.num_patches
    fusion = model.fuse(image_embeds.expand(len(text.words), -1, -1), text)
    assert fusion is not None  # as is said above
    left_out = patch_grid((fusion.fused[1:] - fusion.fused[:1]).abs().mean(dim=2), side)
    names = [word for word, _ in words]
    if not isinstance(model.gated_fusion, CrossFusion):
        return WordMaps(names, left_out, None)
    whole = model.look_up([ids])
    shares = model.gated_fusion.attention(image_embeds, model.words_for_fusion(whole), whole.mask)[0]
    change = (fusion.fused[0] - image_embeds[0]).abs().mean(dim=1)  # (N,)
    others = [i for i in range(len(ids)) if not any(i in places for _, places in words)]
    parts = [shares[:, places].sum(dim=1) * change for places in (*(p for _, p in words), others)]
    return WordMaps(names, left_out, patch_grid(torch.stack(parts), side))


def places_of_words(model: Blip2QformerCirAlignPrompt, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words between [CLS] and [SEP], the first and the last id: each with the places of its pieces."""
    words: list[tuple[str, list[int]]] = []
    for place in range(1, len(ids) - 1):
        piece = str(model.tokenizer.convert_ids_to_tokens(ids[place]))
        if piece.startswith("##") and words:
            word, places = words.pop()
            words.append((word + piece.removeprefix("##"), [*places, place]))
        else:
            words.append((piece, [place]))
    return words
