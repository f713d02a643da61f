"""What BLIP-2's models share (Li et al. 2023): a vision transformer, a Q-Former and its heads.

Shapes: B images, N image tokens, D image width, Q queries, C hidden width, E embedding width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.config import ModelConfig
from sprc.errors import InputError
from sprc.models.qformer import QFormer, ScaledImage
from sprc.models.tokenizer import CaptionIds, WordPiece
from sprc.models.vision import ClipViT, EvaViT
from sprc.models.vision_groups import steady_tokens


class Blip2Qformer(nn.Module):
    """The parts, under LAVIS's names; a model of this project adds its calls and says what learns.

    Args:
        config: widths, depths, epsilons and switches.
        tokenizer: a BERT tokenizer of ``config.vocab_size`` entries.
    """

    # The method that torch.compile takes: it and not the model, so that parameters keep their names.
    compiled: ClassVar[str]

    def __init__(self, config: ModelConfig, tokenizer: WordPiece) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.caption_ids = CaptionIds(tokenizer, config.max_txt_len)

        self.visual_encoder = self.vision_transformer(config)
        self.ln_vision = nn.LayerNorm(config.vit_width, eps=config.vision_norm_eps)

        self.Qformer = QFormer(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            image_width=config.vit_width,
            cross_attention_every=config.cross_attention_every,
            max_positions=config.max_positions,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            initializer_range=config.initializer_range,
        )
        token_shape = (1, config.num_query_tokens, config.hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(token_shape).normal_(std=config.initializer_range))
        self.prompt_tokens = nn.Parameter(torch.empty(token_shape).normal_(std=config.initializer_range))
        self.vision_proj = nn.Linear(config.hidden_size, config.embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.visual_encoder.requires_grad_(not config.freeze_vit)

    @staticmethod
    def vision_transformer(config: ModelConfig) -> EvaViT | ClipViT:
        """The image encoder that ``config`` describes, with random weights."""
        arguments: dict[str, Any] = {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vit_width,
            "depth": config.vit_depth,
            "heads": config.vit_heads,
            "mlp_ratio": config.vit_mlp_ratio,
            "norm_eps": config.vit_norm_eps,
        }
        if config.vit == "eva":
            return EvaViT(**arguments, initializer_range=config.initializer_range)
        return ClipViT(**arguments)

    def train(self, mode: bool = True) -> Blip2Qformer:
        """Set the mode; a frozen vision transformer stays in eval mode always."""
        super().train(mode)
        if self.config.freeze_vit:
            self.visual_encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.query_tokens.device

    def pad(self, rows: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
        """The token ids of B captions, (B, M), and the (B, M) mask of what is no padding, both on the CPU.

        M is ``length``, by default that of the longest caption.
        """
        length = max(map(len, rows)) if length is None else length
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
        return ids, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) pixels, or (B, N, D) tokens from a feature cache, to normalised tokens (B, N, D)."""
        return self.normalise(self.vit_tokens(image))

    def vit_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to the vision transformer's tokens (B, N, D). No graph through a frozen one.

        On a GPU a frozen ViT runs in float16, as in LAVIS, whatever the precision around it. On a CPU its
        rounding does not depend on what else is in the batch, so tokens from a cache are the same to the bit.
        What already is (B, N, D) is returned as it is. Pixels of another size than the model's, and an image
        that is not in a batch, raise :class:`InputError`.
        """
        side = self.config.image_size
        if image.dim() == 3:
            tokens = (self.config.num_patches**2 + 1, self.config.vit_width)
            if image.shape[1:] != tokens:
                raise InputError(
                    f"images have the shape {tuple(image.shape)}; give a batch, (B, 3, {side}, {side}), or "
                    f"tokens of the vision transformer, (B, {tokens[0]}, {tokens[1]})"
                )
            return image
        if image.shape[-2:] != (side, side):
            raise InputError(
                f"the images have {image.shape[-2]} x {image.shape[-1]} pixels, and the model takes {side} x "
                f"{side}; write `image_size: {image.shape[-1]}` into the file of SPRC_SWITCHES, or give "
                "--image-size"
            )
        if not self.config.freeze_vit:
            return self.visual_encoder(image)
        on_gpu = image.device.type == "cuda"
        dtype = torch.float16 if on_gpu else torch.bfloat16  # torch 2.0's CPU refuses float16, off or not
        with torch.no_grad(), torch.autocast(image.device.type, dtype, enabled=on_gpu):
            return self.visual_encoder(image) if on_gpu else steady_tokens(self.visual_encoder, image)

    def normalise(self, tokens: Tensor) -> Tensor:
        """ln_vision, which is trained: (B, N, D) to (B, N, D) of its own type, float32 in use."""
        return self.ln_vision(tokens.to(self.ln_vision.weight.dtype))

    def to_be_read(self, tokens: Tensor) -> Tensor | ScaledImage:
        """The same for tokens that only the Q-Former reads: no gradient goes to frozen (B, N, D) tokens."""
        if tokens.requires_grad:
            return self.normalise(tokens)
        norm = self.ln_vision
        return ScaledImage(
            F.layer_norm(tokens.to(norm.weight.dtype), norm.normalized_shape, eps=norm.eps),
            norm.weight,
            norm.bias,
        )
