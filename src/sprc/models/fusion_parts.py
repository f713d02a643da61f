"""What the fusion strategies share: their registry, what they return, and their networks.

`gated_fusion.py` has the strategies that pool the text to one vector and brings all of them together;
`token_fusion.py` has those that edit each token in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSION_STRATEGIES: dict[str, type[FusionModule]] = {}


def register_fusion(name: str) -> Callable[[type[FusionModule]], type[FusionModule]]:
    """Make a class available as ``--fusion-strategy name``."""

    def add(cls: type[FusionModule]) -> type[FusionModule]:
        FUSION_STRATEGIES[name] = cls
        return cls

    return add


class FusionOutput(NamedTuple):
    """What a fusion did to a batch of image tokens."""

    fused: Tensor  # (B, N, D), the edited tokens
    # (B, N, D) in (0, 1), or (B, 1, D) where one gate serves all tokens; None where the strategy has no gate.
    # How much to change; in `tirg` and `gmu`, as in their papers, how much of the image to keep.
    gate: Tensor | None
    # The direction of the edit, in (-1, 1); None where there is none. (B, 1, D) where all tokens have the
    # same, (B, N, D), or (B, k, D) of the tokens that are chosen.
    delta: Tensor | None
    # (B, N, 1), 0 or more: what the gate of a token is multiplied by. None is 1 for all of them.
    weights: Tensor | None = None


class FusionModule(nn.Module):
    """A strategy, as the model makes and calls it.

    Args:
        image_width: D, the channels of an image token.
        text_width: Dt, the channels of a word embedding.
        dropout: inside each MLP; strategies without an MLP ignore it.
        alpha_init: start of the learned strength; strategies without alpha ignore it.
        pool: "masked" takes the mean over the words alone, "all" over the padding as well; strategies that
            take no mean ignore it.
        start: "random", or "identity", where step 0 leaves the tokens as they are. A strategy that cannot
            raises :class:`InputError`.
        width: W, of the bottleneck in `cross` and `select`, at most D; the others ignore it.
        top_k: k, how many tokens `select` edits, at most N; the others ignore it.
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
        width: int = 512,
        top_k: int = 8,
    ) -> None:
        super().__init__()

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor) -> FusionOutput:
        """Edit (B, N, D) image tokens by (B, M, Dt) words and their (B, M) mask of ones and zeros."""
        raise NotImplementedError


def text_projection(text_width: int, image_width: int) -> nn.Module:
    """From a text's vector to the image's width; nothing to do where they are the same."""
    return nn.Linear(text_width, image_width) if text_width != image_width else nn.Identity()


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision to float32; what is float32 or float64 is returned as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def start_at_zero(layer: nn.Linear) -> None:
    """Make the layer's output zero until it has learned."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class Mlp(nn.Sequential):
    """Linear, LayerNorm, ReLU, Dropout, Linear: the network of the gates, of delta and of the residual.

    ``hidden_width`` is that between the two linear layers; None is ``out_width``.
    """

    def __init__(
        self, in_width: int, out_width: int, dropout: float, hidden_width: int | None = None
    ) -> None:
        hidden_width = hidden_width or out_width
        first, last = nn.Linear(in_width, hidden_width), nn.Linear(hidden_width, out_width)
        super().__init__(first, nn.LayerNorm(hidden_width), nn.ReLU(), nn.Dropout(dropout), last)

    @property
    def first(self) -> nn.Linear:
        """The layer that reads the input."""
        return cast(nn.Linear, self[0])

    @property
    def last(self) -> nn.Linear:
        """The layer that makes the output."""
        return cast(nn.Linear, self[-1])

    def after_first(self, hidden: Tensor) -> Tensor:
        """The output, from what the first layer gave."""
        for layer in [*self][1:]:
            hidden = layer(hidden)
        return hidden


def mlp_of_pair(layers: Mlp, image_embeds: Tensor, t: Tensor) -> Tensor:
    """MLP([I ; t]), (B, N, K), its first layer by :func:`linear_of_pair`."""
    return layers.after_first(linear_of_pair(layers.first.weight, layers.first.bias, image_embeds, t))


def linear_of_pair(weight: Tensor, bias: Tensor | None, image_embeds: Tensor, t: Tensor) -> Tensor:
    """W [I ; t] + b as W_i I + (W_t t + b), (B, N, K), without building the concatenation.

    Args:
        weight: W = [W_i, W_t], (K, D + E).
        bias: b, (K,), or None.
        image_embeds: I, (B, N, D).
        t: (B, 1, E).
    """
    image_weight, text_weight = weight.split([image_embeds.shape[-1], t.shape[-1]], dim=1)
    return F.linear(image_embeds, image_weight) + F.linear(t, text_weight, bias)
