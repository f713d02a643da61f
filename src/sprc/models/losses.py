"""The losses of SPRC (ICLR 2024): two contrastive ones over the batch, and the prompt alignment.

Beside InfoNCE there is the complementary loss, for triplets of which some are wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sprc.distributed import of_all_ranks, rank, world_size


class GatherRows(torch.autograd.Function):
    """The rows of all ranks, in their order; a row's gradient is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """(B, ...) on each rank to (ranks * B, ...) on all of them."""
        ctx.count = len(rows)
        return of_all_ranks(rows).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """(ranks * B, ...) to this rank's (B, ...)."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.unflatten(0, (-1, ctx.count))[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) of each rank to (ranks * B, ...), with gradients; without torchrun the rows themselves.

    So a rank's loss sees the global batch's targets. Where the losses of the ranks are means over their own
    rows, the mean of the ranks' gradients, which DistributedDataParallel takes, is the gradient of the global
    batch's loss.
    """
    return rows if world_size() == 1 else GatherRows.apply(rows)


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


def contrastive_loss(queries: Tensor, targets: Tensor, temp: Tensor, first: int = 0) -> Tensor:
    """InfoNCE: cross-entropy of similarity / temp, each query's own target on the diagonal.

    Args:
        queries: (B, C), normalised.
        targets: (G, Q, C), normalised; row first + i belongs to query i, the others are its negatives.
        temp: scalar, the learned temperature.
        first: above 0 where queries are a rank's and targets those of all ranks.

    Returns:
        Scalar; SPRC's `loss_itc` for the sentence-prompt queries, `loss_rtc` for the text-only ones.
    """
    logits = logits_of(queries, targets, temp)
    return F.cross_entropy(logits, first + torch.arange(len(logits), device=logits.device))


def complementary_loss(queries: Tensor, targets: Tensor, temp: Tensor, first: int = 0) -> Tensor:
    """The robust loss for triplets of which some are wrong: -sum over a query's negatives of log(1 - p).

    p is the softmax of the logits that :func:`contrastive_loss` takes. InfoNCE's pull towards a target is the
    stronger the less the model believes in it, and so goes to wrong targets first. Here the pull is that of
    the negatives which the model believes in, times p of the target: from a target that it does not believe
    in there is hardly any.

    TME (Learning with Noisy Triplet Correspondence for Composed Image Retrieval, CVPR 2025) trains with it in
    place of InfoNCE, on the query's and on the text-only contrast alike.

    Args:
        queries: (B, C), normalised.
        targets: (G, Q, C), normalised; row first + i belongs to query i, the others are its negatives.
        temp: scalar, the learned temperature.
        first: above 0 where queries are a rank's and targets those of all ranks.

    Returns:
        Scalar, the mean over the queries; 0 without negatives.
    """
    logp = logits_of(queries, targets, temp).log_softmax(dim=1)
    rows = torch.arange(len(logp), device=logp.device)
    own = first + rows[:, None] == torch.arange(logp.shape[1], device=logp.device)
    p = logp.exp()
    # One negative at most has more than half of a row. 1 - p would have no digits left there where p comes
    # near 1, so it is added up from what the others have.
    steep = ~own & (p > 0.5)
    rest = logp.masked_fill(steep, -torch.inf).logsumexp(dim=1)
    rest = torch.where(steep.any(dim=1), rest, torch.zeros_like(rest))
    gentle = torch.log1p(-p.masked_fill(own | steep, 0.0)).sum(dim=1)
    return -(gentle + rest).mean()


def logits_of(queries: Tensor, targets: Tensor, temp: Tensor) -> Tensor:
    """(B, C) and (G, Q, C) to (B, G): similarity / temp, in float32 at least."""
    # Mixed precision would round similarities to steps that 1 / temp makes large.
    with torch.autocast(queries.device.type, enabled=False):
        queries, targets = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (queries, targets))
        return similarity(queries, targets) / temp


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
