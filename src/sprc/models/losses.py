"""The losses of SPRC (ICLR 2024): two contrastive ones over the batch, and the prompt alignment.

Further the complementary loss, for triplets of which some are wrong, and those that see more negatives than
the batch has: over a bank of fixed features, and in pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sprc.distributed import of_all_ranks, rank, world_size
from sprc.models.fusion_parts import at_least_float32


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
        queries, targets = (at_least_float32(x) for x in (queries, targets))
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


def bank_loss(
    queries: Tensor, bank: Tensor, positives: Tensor, temp: float, excluded: Tensor, chunk: int
) -> Tensor:
    """InfoNCE over a bank of features, which are fixed: the gradient flows through queries and positives.

    Args:
        queries: (B, E), normalised.
        bank: (K, Q, E), normalised, of any floating type; the products are made in float32 at least.
        positives: (B, Q, E), normalised: what each query asks for.
        temp: the temperature.
        excluded: (B, K), True for what is no negative of the query; its own target is.
        chunk: images of the bank at once.

    Returns:
        Scalar: the mean of -log of the positive's share in the softmax of similarity / temp over it and the
        bank's images that are not excluded.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = at_least_float32(queries)
        own = pair_similarity(queries, positives.to(queries.dtype)) / temp
        others = OverBank.apply(queries, bank, temp, excluded, chunk)
        return F.softplus(others - own).mean()


class OverBank(torch.autograd.Function):
    """The log of the sum of exp(similarity / temp) over a bank, (B,), see :func:`bank_loss`.

    The bank is walked in chunks, whose products are made again in the backward pass: of the (B, K, Q)
    products only a chunk's (B, chunk, Q) stand in memory at once.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, bank: Tensor, temp: float, excluded: Tensor, chunk: int) -> Tensor:
        """Of the arguments only ``queries`` gets a gradient."""
        chunks = list(zip(bank.split(chunk), excluded.split(chunk, dim=1)))
        # Made ahead: a small tensor kept from each round would lie between the large ones that come and go.
        parts = queries.new_empty(len(queries), len(chunks))
        for part, (images, hidden) in zip(parts.unbind(dim=1), chunks):
            logits = similarity(queries, images.to(queries.dtype)) / temp
            part.copy_(logits.masked_fill_(hidden, -torch.inf).logsumexp(dim=1))
        total = parts.logsumexp(dim=1)
        ctx.save_for_backward(queries, bank, excluded, total)
        ctx.temp, ctx.chunk = temp, chunk
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """A query's gradient: the token that is its maximum in each image, weighted by the image's share."""
        queries, bank, excluded, total = ctx.saved_tensors
        result = torch.zeros_like(queries)
        for images, hidden in zip(bank.split(ctx.chunk), excluded.split(ctx.chunk, dim=1)):
            tokens = images.to(queries.dtype).flatten(0, 1)  # (chunk * Q, E)
            products = (queries @ tokens.T).unflatten(1, images.shape[:2])
            best, place = products.max(dim=2, keepdim=True)
            share = (best[..., 0] / ctx.temp - total[:, None]).exp().masked_fill(hidden, 0)
            weight = grad[:, None] / ctx.temp * share
            spread = products.zero_().scatter_(2, place, weight[..., None])
            result += spread.flatten(1) @ tokens
        return result, None, None, None, None


def pairwise_loss(queries: Tensor, positives: Tensor, negatives: Tensor, temp: Tensor) -> Tensor:
    """QuRe's loss (ICML 2025): -log sigmoid((s+ - s-) / temp), the mean over queries and their negatives.

    Args:
        queries: (B, E), normalised.
        positives: (B, Q, E), normalised: what each query asks for.
        negatives: (B, P, Q, E), normalised: P images a query that it should score lower.
        temp: scalar, the temperature.

    Returns:
        Scalar.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, positives, negatives = (at_least_float32(x) for x in (queries, positives, negatives))
        better, worse = pair_similarity(queries, positives), pair_similarity(queries, negatives)
        return -F.logsigmoid((better[:, None] - worse) / temp).mean()


def pair_similarity(queries: Tensor, targets: Tensor) -> Tensor:
    """As :func:`similarity`, of each query to its own targets alone: (B, E), (B, ..., Q, E) to (B, ...)."""
    return torch.einsum("be,b...qe->b...q", queries, targets).max(dim=-1).values
