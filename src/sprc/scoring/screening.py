"""Exact ranks from products of few bits: what lies within their error of the target is scored again.

A rank asks of each candidate only whether it is above the target, and the error of a product has a bound.
Farther from the target than that, a candidate is on its side for certain. All others are scored again in
float64, from the few tokens that can matter. So the ranks are those of exact similarities, rounded to float32
in the end, whatever the products were made in: bfloat16 where the processor has instructions for it, which
takes half the time, else float32.

With q and g the vectors, q' and g' the same in the products' type, E their width, u the type's unit of
rounding and p' the product that is found, of q' and g', summed in float32, the Cauchy-Schwarz inequality
gives

    |q g - p'| <= |q - q'| |g| + |q'| |g - g'| + 2^-23 (E + 2) |q'| |g'| + u / (1 - u) |p'|

Shapes: T queries, R queries of a block, G gallery images, Q tokens an image, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sprc.scoring.ranking import block_scores, refuse_what_is_not_finite

# Queries scored at once, and gallery images a product: a product's results stay in a core's cache.
QUERY_BLOCK = 256
GALLERY_CHUNK = 64

# Where a product leaves more candidates in doubt, the images look alike to the model. Then a block's scores
# are float32's, and so are their ties.
MOST_IN_DOUBT = 512


def product_type() -> torch.dtype:
    """bfloat16 where this processor has instructions for it, as far as torch can tell, else float32."""
    known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    has_bfloat16 = any(supported is not None and supported() for supported in known)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def screened_blocks(queries: Tensor, gallery: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks as :func:`sprc.scoring.ranking.score_blocks` makes them, for the ranks of the targets alone.

    The target's score is exact, and each other is above it, equal to it or below it as its exact score is.
    Among themselves the others are in no order that means something. Queries to which hundreds of images look
    alike get plain scores.

    Args:
        queries: (T, E) on the CPU.
        gallery: (G, Q, E) on the CPU, float32 or float16.
        targets: (T,) gallery indices.

    Raises:
        FloatingPointError: a similarity is not finite.
    """
    error = ErrorBound.of(gallery, product_type())
    screen = True
    for numbers in torch.arange(len(queries)).split(QUERY_BLOCK):
        scores = screened_scores(queries[numbers], gallery, targets[numbers], error) if screen else None
        # Where all images look alike to the model, they do so to its other queries too.
        screen = scores is not None
        yield numbers, block_scores(queries[numbers], gallery) if scores is None else scores


class ErrorBound(NamedTuple):
    """What the error of a product with a gallery's tokens depends on."""

    dtype: torch.dtype  # of the products
    length: float  # of the longest token
    lost: float  # the most that rounding to the type takes from one, as a length

    @classmethod
    def of(cls, gallery: Tensor, dtype: torch.dtype) -> ErrorBound:
        """The bound for a (G, Q, E) gallery."""
        length = lost = 0.0
        for part in gallery.split(GALLERY_CHUNK):
            part = part.float()
            length = max(length, part.norm(dim=-1).max().item())
            lost = max(lost, (part - part.to(dtype).float()).norm(dim=-1).max().item())
        return cls(dtype, length, lost)

    def around(self, queries: Tensor, scores: Tensor) -> Tensor:
        """How far from a score a product may lie whose exact value is on the score's other side, (R,).

        Args:
            queries: (R, E) float32.
            scores: (R,), one of each query.
        """
        rounded = queries.to(self.dtype).float()
        length = rounded.norm(dim=-1)
        before_rounding = (
            (queries - rounded).norm(dim=-1) * self.length
            + length * self.lost
            # Twice, because the score may be a sum in float32 too.
            + 2 * 2**-23 * (queries.shape[1] + 2) * length * (self.length + self.lost)
        )
        unit = torch.finfo(self.dtype).eps / 2
        # The product's own rounding is relative to the product, which lies as near to the score as this.
        return 1.01 * (before_rounding + unit * scores.abs())


def screened_scores(queries: Tensor, gallery: Tensor, targets: Tensor, error: ErrorBound) -> Tensor | None:
    """One block of :func:`screened_blocks`: (R, G), or None where too many candidates are in doubt.

    Args:
        queries: (R, E).
        gallery: (G, Q, E).
        targets: (R,) gallery indices.
        error: of the gallery.
    """
    queries = queries.float()
    own = (gallery[targets].float() @ queries[:, :, None]).amax(dim=(1, 2))  # (R,), in float32
    margin = error.around(queries, own)
    least = own - margin
    columns = queries.T.to(error.dtype).contiguous()  # (E, R)
    scores = torch.empty(len(gallery), len(queries))
    for start in range(0, len(gallery), GALLERY_CHUNK):
        part = gallery[start : start + GALLERY_CHUNK]
        products = (part.to(error.dtype).flatten(0, 1) @ columns).unflatten(0, part.shape[:2])
        best = products.amax(dim=1).float()  # of (chunk, Q, R) the (chunk, R)
        image, query = ((best - own).abs_() <= margin).nonzero(as_tuple=True)  # (P,) pairs in doubt
        if len(image) > MOST_IN_DOUBT:
            return None
        pair, token = (products[image, :, query] >= least[query, None]).nonzero(as_tuple=True)
        again = exact(part[image[pair], token], queries[query[pair]])
        best[image, query] = again.new_full(image.shape, -torch.inf).scatter_reduce(0, pair, again, "amax")
        scores[start : start + GALLERY_CHUNK] = best
    refuse_what_is_not_finite(scores)
    return scores.T.contiguous()


def exact(tokens: Tensor, queries: Tensor) -> Tensor:
    """Similarities in float64, rounded to float32: of (P, E) and (P, E) the (P,)."""
    return (tokens.double() * queries.double()).sum(dim=-1).float()
