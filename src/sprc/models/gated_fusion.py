"""Fusion: the modification text edits the reference image's tokens before the Q-Former reads them.

With image tokens I (N, D) and the pooled, projected text t (1, D), the default strategy is

    gate  = sigmoid(MLP_g([I ; t]))         (N, D), in (0, 1): how much to change
    delta = tanh(MLP_d(t))                  (1, D), in (-1, 1): in which direction
    fused = I + alpha * gate * delta        (N, D)

Adding a strategy is one class in this file, under ``@register_fusion("name")``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.errors import InputError

FUSION_STRATEGIES: dict[str, type["FusionModule"]] = {}


def register_fusion(name: str) -> Callable[[type["FusionModule"]], type["FusionModule"]]:
    """Make a class available as ``--fusion-strategy name``."""

    def add(cls: type["FusionModule"]) -> type["FusionModule"]:
        FUSION_STRATEGIES[name] = cls
        return cls

    return add


def fusion_class(name: str) -> type["FusionModule"]:
    """The class of a strategy; an unknown name raises :class:`InputError` that lists the known ones."""
    if name not in FUSION_STRATEGIES:
        raise InputError(f"fusion_strategy={name!r} is unknown; choose from {', '.join(FUSION_STRATEGIES)}")
    return FUSION_STRATEGIES[name]


class FusionOutput(NamedTuple):
    """What a fusion did to a batch of image tokens."""

    fused: Tensor  # (B, N, D), the edited tokens
    gate: Tensor | None  # (B, N, D) in (0, 1); None where the strategy has no gate
    delta: Tensor  # (B, 1, D) in (-1, 1), the direction of the edit


class FusionModule(nn.Module):
    """The text side that all strategies share: pooling, projection to the image's width, and delta.

    Args:
        image_width: D, the channels of an image token.
        text_width: Dt, the channels of a word embedding.
        dropout: inside each MLP.
        alpha_init: start of the learned strength; strategies without alpha ignore it.
        pool: "masked" takes the mean over the words alone, "all" over the padding as well.
        start: "random", or "identity", where the last layer of delta starts at zero, so that step 0
            leaves the tokens as they are.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        alpha_init: float = 0.5,
        pool: str = "masked",
        start: str = "random",
    ) -> None:
        super().__init__()
        self.pool = pool
        self.text_proj = nn.Linear(text_width, image_width) if text_width != image_width else nn.Identity()
        self.delta_mlp = mlp(image_width, image_width, dropout)
        if start == "identity":
            nn.init.zeros_(self.delta_mlp[-1].weight)
            nn.init.zeros_(self.delta_mlp[-1].bias)

    def pool_text(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean word embedding, projected: (B, M, Dt) and a (B, M) mask of ones and zeros to (B, 1, D)."""
        if self.pool == "all":
            t = text_embeds.mean(dim=1, keepdim=True)
        else:
            mask = attention_mask.unsqueeze(-1).to(text_embeds.dtype)  # (B, M, 1)
            t = (text_embeds * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return self.text_proj(t)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> FusionOutput:
        """Edit (B, N, D) image tokens by (B, M, Dt) word embeddings and their (B, M) mask."""
        t = self.pool_text(text_embeds, attention_mask)
        # One row a sample: delta depends on the text alone, so it is not repeated for the N tokens.
        delta = torch.tanh(self.delta_mlp(t))
        return self.fuse(image_embeds, t, delta)

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """Combine (B, N, D) tokens with the (B, 1, D) text and the (B, 1, D) direction."""
        raise NotImplementedError


def mlp(in_width: int, out_width: int, dropout: float) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, Dropout, Linear: the shape of both the gate's and delta's network."""
    return nn.Sequential(
        nn.Linear(in_width, out_width),
        nn.LayerNorm(out_width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(out_width, out_width),
    )


def gate_values(gate_mlp: nn.Sequential, image_embeds: Tensor, t: Tensor) -> Tensor:
    """sigmoid(MLP_g([I ; t])), (B, N, D), without building the 2D-wide concatenation.

    The first layer's weight is [W_i, W_t], so W [I ; t] + b = W_i I + (W_t t + b), and the bracket is
    one row a sample. Same parameters and result as the written formula, at 2 N D^2 instead of 3 N D^2.
    """
    first, *rest = gate_mlp
    image_weight, text_weight = first.weight.split(image_embeds.shape[-1], dim=1)
    hidden = F.linear(image_embeds, image_weight) + F.linear(t, text_weight, first.bias)
    for layer in rest:
        hidden = layer(hidden)
    return torch.sigmoid(hidden)


@register_fusion("gated")
class GatedFusionModule(FusionModule):
    """fused = I + alpha * gate * delta, with alpha learned. At D = Dt = 768: 2,955,265 parameters."""

    def __init__(
        self,
        image_width: int,
        text_width: int,
        *,
        dropout: float = 0.1,
        alpha_init: float = 0.5,
        **options: str,
    ) -> None:
        super().__init__(image_width, text_width, dropout=dropout, **options)
        self.gate_mlp = mlp(2 * image_width, image_width, dropout)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """See the class."""
        gate = gate_values(self.gate_mlp, image_embeds, t)
        return FusionOutput(image_embeds + gate * (self.alpha * delta), gate, delta)


@register_fusion("additive")
class AdditiveFusion(FusionModule):
    """fused = I + alpha * delta: every token moves by the same step; there is no gate."""

    def __init__(
        self, image_width: int, text_width: int, *, alpha_init: float = 0.5, **options: float | str
    ) -> None:
        super().__init__(image_width, text_width, **options)
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """See the class."""
        return FusionOutput(image_embeds + self.alpha * delta, None, delta)


@register_fusion("weighted")
class WeightedFusion(FusionModule):
    """fused = gate * (I + delta) + (1 - gate) * I, which is I + gate * delta: gated with alpha fixed at 1."""

    def __init__(
        self, image_width: int, text_width: int, *, dropout: float = 0.1, **options: float | str
    ) -> None:
        super().__init__(image_width, text_width, dropout=dropout, **options)
        self.gate_mlp = mlp(2 * image_width, image_width, dropout)

    def fuse(self, image_embeds: Tensor, t: Tensor, delta: Tensor) -> FusionOutput:
        """See the class."""
        gate = gate_values(self.gate_mlp, image_embeds, t)
        return FusionOutput(image_embeds + gate * delta, gate, delta)
