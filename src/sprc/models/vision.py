"""The image encoders of BLIP-2: EVA-CLIP's ViT-g and CLIP's ViT-L, without their last blocks and heads.

Both take (B, 3, S, S) images and give (B, N, D) tokens, N = (S / patch)^2 + 1, [CLS] first. Parameter
names are LAVIS's. Sources: EVA, Fang et al. 2022; CLIP, Radford et al. 2021.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EvaViT(nn.Module):
    """A pre-norm ViT whose query and value have biases while the key has none."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        num_tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.blocks = nn.ModuleList(
            EvaBlock(width, heads, int(width * mlp_ratio), norm_eps) for _ in range(depth)
        )
        nn.init.trunc_normal_(self.cls_token, std=initializer_range)
        nn.init.trunc_normal_(self.pos_embed, std=initializer_range)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for index, block in enumerate(
            cast("Iterable[EvaBlock]", self.blocks), start=1
        ):  # deeper residual branches start smaller
            for linear in (block.attn.proj, cast(nn.Linear, block.mlp["fc2"])):
                linear.weight.data.div_((2 * index) ** 0.5)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, N, D)."""
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class EvaBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = EvaAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))


class EvaAttention(nn.Module):
    """Self-attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return self.proj(self_attention(F.linear(tokens, self.qkv.weight, bias), self.heads))


class ClipViT(nn.Module):
    """CLIP's ViT: a LayerNorm before the blocks, QuickGELU inside."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_tokens = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, eps=norm_eps)
        self.transformer = nn.ModuleDict(
            {
                "resblocks": nn.ModuleList(
                    ClipBlock(width, heads, int(width * mlp_ratio), norm_eps) for _ in range(depth)
                )
            }
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, N, D)."""
        patches = self.conv1(image).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        cls = self.class_embedding.expand(len(image), 1, -1)
        tokens = self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            tokens = block(tokens)
        return tokens


class ClipBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.attn = ClipAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        tokens = tokens + self.attn(self.ln_1(tokens))
        hidden = self.mlp["c_fc"](self.ln_2(tokens))
        return tokens + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU


class ClipAttention(nn.Module):
    """Self-attention under the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        qkv = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(self_attention(qkv, self.heads))


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(Q K' / sqrt(d)) V over all tokens: (B, N, 3 D), queries first, to (B, N, D)."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def resize_positions(positions: Tensor, num_patches: int, align_corners: bool) -> Tensor:
    """Resample (1 + n^2, D) position embeddings to (1 + num_patches^2, D), bicubic, [CLS] kept.

    LAVIS aligns the corners for CLIP's ViT and not for EVA's; weights trained there expect the same.
    """
    cls, grid = positions[:1], positions[1:]
    side = round(len(grid) ** 0.5)
    if side == num_patches:
        return positions
    grid = grid.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, n, n)
    grid = F.interpolate(grid, size=(num_patches, num_patches), mode="bicubic", align_corners=align_corners)
    return torch.cat([cls, grid[0].permute(1, 2, 0).flatten(0, 1).to(cls.dtype)])
