"""Fusion: the modification text edits the reference image's tokens before the Q-Former reads them.

With image tokens I (N, D) and the pooled, projected text t (1, D), the default strategy is

    gate  = sigmoid(MLP_g([I ; t]))         (N, D), in (0, 1): how much to change
    delta = tanh(MLP_d(t))                  (1, D), in (-1, 1): in which direction
    fused = I + alpha * gate * delta        (N, D)

A strategy is one class under ``@register_fusion("name")``, and its line in ``sprc.config.STRATEGIES``, which
`--help` and the ablation read without torch. Those that read the text as one vector, its mean, are here. In
`token_fusion.py` each token gets an edit of its own.

In mixed precision the networks and the gate are computed in half precision. What is one row a sample,
(B, 1, D), and the learned scalars are float32 from there on (:func:`at_least_float32`): in bfloat16, which
has eight bits, ``1 + change`` loses every change below 0.004, and an alpha of 0.501 is 0.5. Products of such
a row with a (B, N, D) gate are float32 by torch's own promotion, inside the kernel: what is kept for the
gradient stays half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sprc.models.token_fusion  # noqa: F401 - its strategies are registered
from sprc.config import STRATEGIES
from sprc.errors import InputError
from sprc.models.fusion_parts import (
    FUSION_STRATEGIES,
    FusionModule,
    FusionOutput,
    Mlp,
    at_least_float32,
    linear_of_pair,
    mlp_of_pair,
    register_fusion,
    start_at_zero,
    text_projection,
)


def fusion_class(name: str) -> type[FusionModule]:
    """The class of a strategy; an unknown name raises :class:`InputError` that lists the known ones."""
    if name not in FUSION_STRATEGIES:
        raise InputError(f"fusion_strategy={name!r} is unknown; choose from {', '.join(STRATEGIES)}")
    return FUSION_STRATEGIES[name]


class PooledFusion(FusionModule):
    """What the strategies share that read the words' mean: pooling and projection to the image's width."""

    def __init__(self, image_width: int, text_width: int, *, pool: str = "masked", **options: Any) -> None:
        super().__init__(image_width, text_width, **options)
        self.pool = pool
        self.text_proj = text_projection(text_width, image_width)

    def pool_text(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean word embedding, projected: (B, M, Dt) and a (B, M) mask of ones and zeros to (B, 1, D)."""
        if self.pool == "all":
            t = text_embeds.mean(dim=1, keepdim=True)
        else:
            mask = attention_mask.unsqueeze(-1).to(text_embeds.dtype)  # (B, M, 1)
            t = (text_embeds * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return self.text_proj(t)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> FusionOutput:
        """See :class:`FusionModule`."""
        return self.edit(image_embeds, self.pool_text(text_embeds, attention_mask))

    def edit(self, image_embeds: Tensor, t: Tensor) -> FusionOutput:
        """Edit (B, N, D) tokens by the (B, 1, D) text."""
        raise NotImplementedError


class DeltaFusion(PooledFusion):
    """What the strategies share that move a token along delta = tanh(MLP_d(t)), (B, 1, D).

    With the identity start the last layer of delta starts at zero.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        start: str = "random",
        **options: Any,
    ) -> None:
        super().__init__(image_width, text_width, **options)
        self.delta_mlp = Mlp(image_width, image_width, dropout)
        if start == "identity":
            start_at_zero(self.delta_mlp.last)

    def edit(self, image_embeds: Tensor, t: Tensor) -> FusionOutput:
        """See :meth:`PooledFusion.edit`."""
        # One row a sample: delta depends on the text alone, so it is not repeated for the N tokens.
        delta = torch.tanh(at_least_float32(self.delta_mlp(t)))
        return self.fuse(image_embeds, t, delta)

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """Combine (B, N, D) tokens with the (B, 1, D) text and the (B, 1, D) direction."""
        raise NotImplementedError


def gate_values(gate_mlp: Mlp, image_embeds: Tensor, t: Tensor) -> Tensor:
    """sigmoid(MLP_g([I ; t])), (B, N, D), without building the 2D-wide concatenation.

    The first layer's weight is [W_i, W_t], so W [I ; t] + b = W_i I + (W_t t + b), and the bracket is
    one row a sample. Same parameters and result as the written formula, at 2 N D^2 instead of 3 N D^2.
    """
    return torch.sigmoid(mlp_of_pair(gate_mlp, image_embeds, t))


@register_fusion("gated")
class GatedFusionModule(DeltaFusion):
    """fused = I + alpha * gate * delta, with alpha learned. At D = Dt = 768: 2,955,265 parameters."""

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        alpha_init: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(image_width, text_width, dropout=dropout, **options)
        self.gate_mlp = Mlp(2 * image_width, image_width, dropout)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """See the class."""
        gate = gate_values(self.gate_mlp, image_embeds, t)
        return FusionOutput(image_embeds + gate * (self.alpha * delta), gate, delta)


@register_fusion("additive")
class AdditiveFusion(DeltaFusion):
    """fused = I + alpha * delta: every token moves by the same step; there is no gate."""

    def __init__(self, image_width: int, text_width: int, *, alpha_init: float = 0.5, **options: Any) -> None:
        super().__init__(image_width, text_width, **options)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """See the class."""
        return FusionOutput(image_embeds + self.alpha * delta, None, delta)


@register_fusion("weighted")
class WeightedFusion(DeltaFusion):
    """fused = gate * (I + delta) + (1 - gate) * I, which is I + gate * delta: gated with alpha fixed at 1."""

    def __init__(self, image_width: int, text_width: int, *, dropout: float = 0.1, **options: Any) -> None:
        super().__init__(image_width, text_width, dropout=dropout, **options)
        self.gate_mlp = Mlp(2 * image_width, image_width, dropout)

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """See the class."""
        gate = gate_values(self.gate_mlp, image_embeds, t)
        return FusionOutput(image_embeds + gate * delta, gate, delta)


@register_fusion("film")
class FilmFusion(PooledFusion):
    """fused = gamma * I + beta: a scale and a shift a channel, both from the text.

    FiLM: Visual Reasoning with a General Conditioning Layer, Perez et al., AAAI 2018. gamma and beta are
    functions of the text (eq. 1) that scale and shift each feature map (eq. 2); gamma = 1 + dgamma, where
    dgamma is what is predicted (eq. 3). As there, the functions are one affine projection of the text's
    vector. Adapted: an image token's channel stands for a feature map's, and the text's vector is the
    projected mean of the word embeddings instead of a GRU's last state. There is no gate, no alpha and no
    dropout.

    With the identity start the projection starts at zero: gamma = 1, beta = 0.
    """

    def __init__(self, image_width: int, text_width: int, *, start: str = "random", **options: Any) -> None:
        super().__init__(image_width, text_width, **options)
        self.generator = nn.Linear(image_width, 2 * image_width)  # dgamma, then beta
        if start == "identity":
            start_at_zero(self.generator)

    def edit(self, image_embeds: Tensor, t: Tensor) -> FusionOutput:
        """See the class."""
        gamma_change, beta = at_least_float32(self.generator(t)).chunk(2, dim=-1)  # (B, 1, D) each
        return FusionOutput((1 + gamma_change) * image_embeds + beta, None, None)


@register_fusion("tirg")
class TirgFusion(PooledFusion):
    """fused = w_g * f_gate + w_r * f_res, with w_g and w_r learned from 1.

    Text Image Residual Gating: Composing Text and Image for Image Retrieval, Vo et al., CVPR 2019:

        fused  = w_g f_gate(I, t) + w_r f_res(I, t)         (eq. 1)
        f_gate = sigmoid(W_g2 ReLU(W_g1 [I ; t])) * I       (eq. 2)
        f_res  = W_r2 ReLU(W_r1 [I ; t])                    (eq. 3)

    Adapted: the W are linear layers a token instead of 3 x 3 convolutions, LayerNorm stands before the ReLU
    for the paper's batch norm (a batch of one must work), and the other strategies' dropout after it. There
    is no alpha. The gate says how much of the image to keep.

    With the identity start the last layers of both networks start at zero and w_g at 2: the gate is then 1/2
    everywhere, f_res is 0, and 2 * (1/2 * I) is I exactly: powers of two do not round.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        start: str = "random",
        **options: Any,
    ) -> None:
        super().__init__(image_width, text_width, **options)
        self.gate_mlp = Mlp(2 * image_width, image_width, dropout)
        self.res_mlp = Mlp(2 * image_width, image_width, dropout)
        self.w_g = nn.Parameter(torch.tensor(1.0))
        self.w_r = nn.Parameter(torch.tensor(1.0))
        if start == "identity":
            start_at_zero(self.gate_mlp.last)
            start_at_zero(self.res_mlp.last)
            nn.init.constant_(self.w_g, 2.0)

    def edit(self, image_embeds: Tensor, t: Tensor) -> FusionOutput:
        """See the class."""
        gate = gate_values(self.gate_mlp, image_embeds, t)
        residual = mlp_of_pair(self.res_mlp, image_embeds, t)
        # With an axis w_r promotes the residual; a scalar would be rounded to the residual's type.
        return FusionOutput(self.w_g * (gate * image_embeds) + self.w_r[None] * residual, gate, None)


@register_fusion("gmu")
class GmuFusion(PooledFusion):
    """fused = z * h_v + (1 - z) * h_t: each channel of a token is a mix of what image and text say.

    Gated Multimodal Units for Information Fusion, Arevalo et al., ICLR 2017 workshop, the bimodal unit:

        h_v   = tanh(W_v I)                                 (eq. 1)
        h_t   = tanh(W_t t)                                 (eq. 2)
        z     = sigmoid(W_z [I ; t])                        (eq. 3)
        fused = z * h_v + (1 - z) * h_t                     (eq. 4)

    with W_v, W_t, W_z learned (eq. 5) and no biases. Adapted: the unit acts on each image token with the one
    vector of the text. There is no alpha and no dropout. The gate z says how much of the image to keep.
    Nothing small is added to something large here, so in mixed precision all of it is half precision.

    Raises:
        InputError: for the identity start. A mix of two tanh lies in (-1, 1) and cannot be the token itself.
    """

    def __init__(self, image_width: int, text_width: int, *, start: str = "random", **options: Any) -> None:
        if start == "identity":
            raise InputError(
                "fusion_strategy='gmu' has no identity start, since its tokens go through tanh; "
                "give --fusion-start random"
            )
        super().__init__(image_width, text_width, **options)
        self.image_layer = nn.Linear(image_width, image_width, bias=False)
        self.text_layer = nn.Linear(image_width, image_width, bias=False)
        self.gate_layer = nn.Linear(2 * image_width, image_width, bias=False)

    def edit(self, image_embeds: Tensor, t: Tensor) -> FusionOutput:
        """See the class."""
        gate = torch.sigmoid(linear_of_pair(self.gate_layer.weight, None, image_embeds, t))
        from_image, from_text = torch.tanh(self.image_layer(image_embeds)), torch.tanh(self.text_layer(t))
        return FusionOutput(gate * from_image + (1 - gate) * from_text, gate, None)
