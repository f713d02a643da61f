"""BLIP-2's first stage (Li et al. 2023, section 3.1): a Q-Former learns to tie images to words.

Two of its three losses, image-text contrast and image-text matching. The third, captioning, needs an
attention mask that no call of SPRC has.

B pairs of an image and its description, Q queries, N image tokens, D image width, E embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Text
from sprc.models.losses import similarity
from sprc.models.qformer import ImageKeys

# By which wrong pairs are drawn. BLIP-2 takes the contrast's own, some 0.07; but a made description tells a
# part of a scene, and is often true of the image that contrast takes for its nearest.
WRONG_TEMPERATURE = 0.3


class FirstStage(nn.Module):
    """The losses of the first stage around a model, as :class:`sprc.training.loop.Trainer` takes them.

    Args:
        model: with fusion off; its matching head is trained, and its prompts, which only SPRC has, are not.
    """

    def __init__(self, model: Blip2QformerCirAlignPrompt) -> None:
        super().__init__()
        self.model = model
        self.diagnostics: dict[str, Tensor] = {}
        model.itm_head.requires_grad_(True)
        model.prompt_tokens.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch of pairs.

        Args:
            samples: `image`, (B, 3, S, S) pixels; `text_input`, their B descriptions.

        Returns:
            `loss_itc` and `loss_itm`, unweighted scalars.
        """
        descriptions = samples["text_input"]
        keys = self.model.Qformer.bert.image_keys(self.model.encode_image(samples["image"]))
        images, texts = self.model.target_features(keys), self.text_features(descriptions)
        alike = similarity(texts, images)
        matching = self.matching_loss(keys, descriptions, alike.detach())
        return {"loss_itc": contrast(alike / self.model.temp), "loss_itm": matching}

    def text_features(self, descriptions: list[str]) -> Tensor:
        """Descriptions as vectors, from [CLS] of a pass without queries: (B, E), normalised."""
        words = self.model.words_in_context(self.model.tokenize(descriptions))
        return F.normalize(self.model.text_proj(words[:, 0]), dim=-1)

    def match(self, keys: ImageKeys, text: Text) -> Tensor:
        """How well each of B images and texts match: (B, 2) logits of no and yes, the mean over the queries.

        The queries see the image and, by the text's layers, the words: SPRC's call 1.
        """
        return self.model.itm_head(self.model.prompts_of(keys, text)).mean(dim=1)

    def matching_loss(self, keys: ImageKeys, descriptions: list[str], alike: Tensor) -> Tensor:
        """Cross-entropy of :meth:`match` on each pair, and on one wrong image and one wrong text of each.

        The wrong ones are drawn, as in BLIP-2, by how alike contrast finds them: ``alike`` (B, B), a row a
        text.
        """
        own = torch.arange(len(descriptions), device=alike.device)
        others = (alike / WRONG_TEMPERATURE).masked_fill(own[:, None] == own, -torch.inf)
        wrong_image = others.softmax(dim=1).multinomial(1)[:, 0]  # of each text
        wrong_text = others.T.softmax(dim=1).multinomial(1)[:, 0]  # of each image
        images, texts = torch.cat([own, wrong_image, own]), torch.cat([own, own, wrong_text])
        text = self.model.tokenize([descriptions[i] for i in texts.tolist()])
        chosen: ImageKeys = [pair and (pair[0][images], pair[1][images]) for pair in keys]
        return F.cross_entropy(self.match(chosen, text), (images == texts).long())


def contrast(logits: Tensor) -> Tensor:
    """InfoNCE both ways, the mean of the two: (B, B) logits, each pair's own on the diagonal."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
