"""Small models, captions and images that several test files share."""

import math

import torch
from helpers.plain_model import SPECIAL_TOKENS
from torch import Tensor, nn

from sprc.config import ModelConfig
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.qformer import Layout, QFormer
from sprc.models.vision import ClipViT, EvaViT

WORDS = "make the small red circle blue and remove square in top left add a green star"
VOCABULARY = [*SPECIAL_TOKENS, *WORDS.split()]

# Widths that differ from each other, so that a mix-up does not fit; epsilons large enough to be felt.
SMALL = {
    "image_size": 12,
    "patch_size": 4,
    "vit_width": 24,
    "vit_depth": 3,
    "vit_heads": 3,
    "vit_mlp_ratio": 2.3,
    "vit_norm_eps": 0.02,
    "vision_norm_eps": 0.05,
    "vocab_size": len(VOCABULARY) + 1,  # and [DEC]
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 40,
    "max_positions": 30,
    "norm_eps": 0.01,
    "num_query_tokens": 5,
    "embed_dim": 8,
    "max_txt_len": 9,
}

# A short one, one that fills max_txt_len with [CLS] and [SEP], and one in between.
CAPTIONS = ["remove the square", "make the small circle in the top", "add a green star"]
TOO_LONG = "make the small red circle blue and remove the green square in the top left"


def small_config(**changes: object) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def build_qformer(config: ModelConfig) -> QFormer:
    return QFormer(
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
    )


def call_bert(bert, ids=None, mask=None, queries=None, image=None, no_img=False, wanted=None):
    """One of the four calls on (B, M) ids and mask, (B, Q, C) queries, (B, N, D) image tokens.

    Returns (B, L, C) in the order of tests/helpers/plain_model.py, zeros where the text is padding.
    """
    num_queries = 0 if queries is None else queries.shape[1]
    if ids is None:
        layout = Layout(len(queries), num_queries)
        return layout.pad(bert(bert.embeddings(queries).flatten(0, 1), layout, image))
    words = bert.embeddings.word_embeddings(ids)
    if queries is None:
        queries = words[:, :0]
    if no_img:
        embedded = bert.embeddings(queries, 1), bert.embeddings(words, 0, num_queries + 1)
    else:
        embedded = bert.embeddings(queries), bert.embeddings(words, 0)
    layout = Layout.of(mask.bool(), num_queries, cls_first=image is None, words=words)
    if wanted is not None:
        return bert(layout.rows(*embedded), layout, image, wanted)
    padded = layout.pad(bert(layout.rows(*embedded), layout, image))
    if no_img:
        queries, text = padded[:, :num_queries], padded[:, num_queries:]
        padded = torch.cat([text[:, :1], queries, text[:, 1:]], dim=1)
    return padded


def seen(padded: Tensor, mask: Tensor) -> Tensor:
    """(B, L, C) with zeros where the (B, L) mask hides a token."""
    return padded * mask.unsqueeze(-1)


def build_vit(config: ModelConfig) -> EvaViT | ClipViT:
    return Blip2QformerCirAlignPrompt.vision_transformer(config)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter, norms, biases and padding included: no zero or one hides a bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 0:
                parameter.fill_({"temp": 0.3, "alpha": 0.8, "w_g": 1.3, "w_r": 0.7}[name.split(".")[-1]])
            elif parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 2 and "embedding" not in name:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
            elif parameter.dim() == 4:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(noise)


def random_images(count: int, config: ModelConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, config.image_size, config.image_size, generator=generator)
