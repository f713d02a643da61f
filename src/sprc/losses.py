"""The losses of SPRC (ICLR 2024): two contrastive ones over the batch, and the prompt alignment."""

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(queries: Tensor, targets: Tensor) -> Tensor:
    """Late interaction: the maximum over a target's tokens of their product with the query vector.

    Args:
        queries: (B, C), normalised.
        targets: (G, Q, C), normalised, Q tokens a target.

    Returns:
        (B, G).
    """
    num_targets, num_tokens, width = targets.shape
    products = queries @ targets.reshape(num_targets * num_tokens, width).T  # (B, G * Q)
    return products.unflatten(1, (num_targets, num_tokens)).max(dim=2).values


def contrastive_loss(queries: Tensor, targets: Tensor, temp: Tensor) -> Tensor:
    """InfoNCE: cross-entropy of similarity / temp, each query's own target on the diagonal.

    Args:
        queries: (B, C), normalised.
        targets: (B, Q, C), normalised; row i belongs to query i, the others are its negatives.
        temp: scalar, the learned temperature.

    Returns:
        Scalar; SPRC's `loss_itc` for the sentence-prompt queries, `loss_rtc` for the text-only ones.
    """
    # Mixed precision would round similarities to steps that 1 / temp makes large.
    with torch.autocast(queries.device.type, enabled=False):
        queries, targets = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (queries, targets))
        logits = similarity(queries, targets) / temp
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def align_loss(fusion_outputs: Tensor, prompt_tokens: Tensor) -> Tensor:
    """SPRC's `loss_align`: the mean fusion output is drawn to the mean learned prompt.

    Args:
        fusion_outputs: (B, Q, C), the query outputs of the fusion call.
        prompt_tokens: (1, Q, C); no gradient reaches them from here.

    Returns:
        Scalar mean squared error over (B, C).
    """
    target = prompt_tokens.detach().mean(dim=1).expand(len(fusion_outputs), -1)
    return F.mse_loss(fusion_outputs.mean(dim=1), target)
