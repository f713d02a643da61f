"""A fusion that is told the answer: which patches an edit concerns, and what they are in the target."""

import torch
from torch import Tensor

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.fusion_parts import FusionModule, FusionOutput


class OracleFusion(FusionModule):
    """Makes each reference the target in chosen patches, and changes nothing else.

        gate_n  = 1 in the chosen patches, else 0
        fused_n = target_n where the gate is 1, else I_n

    Written so that a gradient reaches the chosen patches of I alone: the identity there, none elsewhere. A
    query is known by its reference's tokens and by its words; one that is not known is an error.

    Args:
        model: in eval mode, whose word embeddings the fusion is given.
        references: (T, N, D), the tokens of each query's reference.
        captions: T of them.
        targets: (T, N, D), the tokens of its target.
        patches: (T, P, P), True in the chosen ones. [CLS] is never one.
    """

    def __init__(
        self,
        model: Blip2QformerCirAlignPrompt,
        references: Tensor,
        captions: list[str],
        targets: Tensor,
        patches: Tensor,
    ) -> None:
        super().__init__(references.shape[-1], model.config.hidden_size)
        text = model.tokenize(captions)
        words = model.Qformer.bert.embeddings(text.words, 0)
        self.known, self.targets = signature(references, words, text.mask), targets
        self.gates = torch.cat([patches.new_zeros(len(patches), 1), patches.flatten(1)], dim=1)[:, :, None]

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> FusionOutput:
        """See :class:`FusionModule`."""
        own = signature(image_embeds.detach(), text_embeds, attention_mask)
        distance, query = (own[:, None] - self.known).abs().amax(dim=2).min(dim=1)
        assert distance.max() < 1e-4, "a query that the oracle was not told of"
        gate, target = self.gates[query], self.targets[query]
        here = image_embeds.detach()
        fused = torch.where(gate, image_embeds + (target - here), here)
        return FusionOutput(fused, gate.float(), None)


def signature(image_embeds: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """What tells queries apart: (B, N, D) tokens and the mean of (B, M, C) words, flat, (B, N * D + C)."""
    seen = mask[:, :, None].to(words.dtype)
    return torch.cat([image_embeds.flatten(1), (words * seen).sum(dim=1) / seen.sum(dim=1)], dim=1)
