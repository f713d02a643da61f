"""Fusion that chooses where: each image token gets an edit of its own, or none.

In mixed precision the networks, a gate and a delta of all tokens, (B, N, D), and their product are half
precision, which is what is kept for the gradient. Alpha joins last, as a tensor with an axis, so that it is
not rounded: the product with it is float32. What has one row a sample, or k, is float32 from there on, and so
is the choice of the k: with eight bits many tokens would be equal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.models.fusion_parts import (
    FusionModule,
    FusionOutput,
    Mlp,
    at_least_float32,
    mlp_of_pair,
    register_fusion,
    start_at_zero,
    text_projection,
)

HEADS = 4


@register_fusion("cross")
class CrossFusion(FusionModule):
    """Each image token reads the words, and gets a gate and a direction from what it read.

        t_n     = heads of softmax((W_q I_n + b) (W_k words)' / sqrt(W / 4)) (W_v words)     (W,)
        gate_n  = sigmoid(MLP_g([I_n ; t_n]))                                               (D,)
        delta_n = tanh(MLP_d([I_n ; t_n]))                                                  (D,)
        fused_n = I_n + alpha * gate_n * delta_n

    with alpha learned. t is multi-head attention (Attention Is All You Need, Vaswani et al., NeurIPS 2017) of
    image tokens over words, with four heads and without padding. It has no output projection, since each
    network begins with one, and no bias of keys, which changes no softmax, or of values, which the networks'
    own do as well. What the words tell of their order is in the words: their position embeddings.

    W is the width of the attention, in four equal heads, and of the networks' hidden layers. At D = 1408,
    Dt = 768, W = 512: 4,921,601 parameters. With the identity start the last layer of delta starts at zero.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        alpha_init: float = 0.5,
        start: str = "identity",
        width: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(image_width, text_width, **options)
        width = HEADS * max(1, min(width, image_width) // HEADS)
        self.query = nn.Linear(image_width, width)
        self.key = nn.Linear(text_width, width, bias=False)
        self.value = nn.Linear(text_width, width, bias=False)
        self.gate_mlp = Mlp(image_width + width, image_width, dropout, width)
        self.delta_mlp = Mlp(image_width + width, image_width, dropout, width)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))
        if start == "identity":
            start_at_zero(self.delta_mlp.last)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> FusionOutput:
        """See :class:`FusionModule`."""
        widths = [image_embeds.shape[-1], self.query.out_features]
        readers = (self.gate_mlp.first, self.delta_mlp.first)
        of_image, of_t = zip(*(layer.weight.split(widths, dim=1) for layer in readers))
        # One product for the three layers that read the tokens: these are cast and kept once, and get one
        # gradient. As in `linear_of_pair`, nothing is built that is D + W wide.
        weight = torch.cat([self.query.weight, *of_image])
        bias = torch.cat([self.query.bias, *(layer.bias for layer in readers)])
        query, for_gate, for_delta = F.linear(image_embeds, weight, bias).chunk(3, dim=-1)
        t = attend(query, self.key(text_embeds), self.value(text_embeds), attention_mask)
        gate = torch.sigmoid(self.gate_mlp.after_first(for_gate + F.linear(t, of_t[0])))
        delta = torch.tanh(self.delta_mlp.after_first(for_delta + F.linear(t, of_t[1])))
        # With an axis alpha promotes the product; a scalar would be rounded to the product's type.
        return FusionOutput(image_embeds + self.alpha[None] * (gate * delta), gate, delta)

    def attention(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """How much of each word a token reads, (B, N, M), of what :meth:`forward` is given.

        The mean over the heads: 0 at padding, and a token's words sum to 1.
        """
        count = text_embeds.shape[1]
        # Where word m's value is the m-th unit vector, what a head reads is its weights.
        words = torch.eye(count, dtype=text_embeds.dtype, device=text_embeds.device).repeat(1, HEADS)
        value = words.expand(len(text_embeds), -1, -1)
        read = attend(self.query(image_embeds), self.key(text_embeds), value, attention_mask)
        return read.unflatten(-1, (HEADS, count)).mean(dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(B, N, W) queries, (B, M, W) keys and values, and the words' (B, M) mask to what is read, (B, N, W)."""
    query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :].bool())
    return heads.transpose(1, 2).flatten(2)


@register_fusion("select")
class SelectFusion(FusionModule):
    """The k image tokens that the text is about are edited, each in its own direction; no other token is.

        s       = W_s words_0 + b                               (1, D), the text
        r_n     = I_n W_2 W_1 s / sqrt(D)                       the relevance of token n
        w_n     = k * softmax of r among the k largest of r     0 for all others, so that w sums to k
        c       = sum_n w_n I_n / k                             (1, D), what is chosen
        gate    = sigmoid(MLP_g([s ; c ; s - c]))               (1, D), one a query
        delta_n = tanh(MLP_d([I_n ; s ; c]))                    (k, D), of the chosen tokens
        fused_n = I_n + alpha * w_n * gate * delta_n

    with alpha learned. The choice has no gradient; the relevance learns through w. Of tokens that are equally
    relevant the first is taken. The image's [CLS] is a token like any other: an edit may concern all of it.

    words_0 is the first word, the text's [CLS]. ``ModelConfig`` sees to it that the words are contextual, so
    that it comes from a text-only pass through the Q-Former's layers. As a word embedding it would be the
    same for every text. The other words and their mask have no say.

    W is the rank of the bilinear form, W_2 W_1, and the width of the networks' hidden layers. Where D is Dt,
    s is words_0 itself. At D = 1408, Dt = 768, W = 512: 8,297,601 parameters. With the identity start the
    last layer of delta starts at zero.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        alpha_init: float = 0.5,
        start: str = "identity",
        width: int = 512,
        top_k: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(image_width, text_width, **options)
        width = min(width, image_width)
        self.top_k = top_k
        self.text_proj = text_projection(text_width, image_width)
        self.relevance = nn.Sequential(
            nn.Linear(image_width, width, bias=False), nn.Linear(width, image_width, bias=False)
        )
        self.gate_mlp = Mlp(3 * image_width, image_width, dropout, width)
        self.delta_mlp = Mlp(3 * image_width, image_width, dropout, width)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))
        if start == "identity":
            start_at_zero(self.delta_mlp.last)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> FusionOutput:
        """See :class:`FusionModule`."""
        image = at_least_float32(image_embeds)
        s = self.text_proj(text_embeds[:, :1])  # (B, 1, D)
        # The form's one row a sample, W_2 W_1 s, so that a token costs D products and not W * D.
        direction = at_least_float32(self.relevance(s)) / math.sqrt(image.shape[-1])
        where = first_of(image.detach(), direction.detach(), self.top_k)  # (B, k)
        rows = where[:, :, None].expand(-1, -1, image.shape[-1])
        chosen = image.gather(1, rows)  # (B, k, D): what follows costs k tokens and not N
        shares = (chosen * direction).sum(dim=-1, keepdim=True).softmax(dim=1)  # (B, k, 1)
        weights = shares.shape[1] * shares
        c = (shares * chosen).sum(dim=1, keepdim=True)  # (B, 1, D)
        gate = torch.sigmoid(at_least_float32(self.gate_mlp(torch.cat([s, c, s - c], dim=-1))))
        delta = torch.tanh(at_least_float32(mlp_of_pair(self.delta_mlp, chosen, torch.cat([s, c], dim=-1))))
        fused = image.scatter_add(1, rows, self.alpha * weights * gate * delta)
        spread = weights.new_zeros(*image.shape[:2], 1).scatter(1, where[:, :, None], weights)
        return FusionOutput(fused, gate, delta, spread)


def first_of(image: Tensor, direction: Tensor, count: int) -> Tensor:
    """The tokens that lie furthest along a direction, furthest first: (B, count) places, at most N.

    Args:
        image: (B, N, D).
        direction: (B, 1, D).
        count: how many.
    """
    # `topk` does not say which of equal tokens it takes.
    order = torch.sort((image * direction).sum(dim=-1), dim=1, descending=True, stable=True).indices
    return order[:, :count]
