"""A frozen vision transformer on a CPU: an image's tokens are the same to the bit, whatever is beside it.

A product of matrices rounds by its shape: an image alone may get other last bits than in a batch, and others
in another batch. So the images of a small ViT are computed in groups of one size, the last one filled up with
zeros, and those of a large one, which gains nothing from company, one by one. Whether an image's place in its
group matters, which depends on processor, libraries and threads, is tried before it is relied on.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sprc.models.vision import ClipViT, EvaBlock, EvaViT

LARGEST_GROUP = 32  # a single image is computed as one as well, so not more than the speed needs
# Multiplications of a group's largest product: a millisecond of a core, beside which starting it is nothing.
LARGE_PRODUCT = 2**25

# Whether the place in a group matters, by the number of threads and the type.
_TRIED: MutableMapping[EvaViT, dict[tuple[int, torch.dtype], bool]] = WeakKeyDictionary()


@torch.no_grad()
def steady_tokens(vit: EvaViT | ClipViT, images: Tensor) -> Tensor:
    """(B, 3, S, S) to (B, N, D), each image's tokens to the bit what they are in any other batch."""
    size = group_size(vit, images)
    groups = (F.pad(part, (0, 0) * 3 + (0, size - len(part))).contiguous() for part in images.split(size))
    return torch.cat([vit(group) for group in groups])[: len(images)]


def group_size(vit: EvaViT | ClipViT, images: Tensor) -> int:
    """How many ``images`` are computed at once; 1 where the ViT is large, or where the place would matter.

    CLIP's sigmoid rounds the last numbers of a tensor unlike the others, and its published ViT is large.
    """
    if isinstance(vit, ClipViT):
        return 1
    weight = cast(Tensor, cast(EvaBlock, vit.blocks[0]).mlp["fc1"].weight)
    size = min(LARGEST_GROUP, LARGE_PRODUCT // (vit.pos_embed.shape[1] * weight.numel()))
    if size < 2:
        return 1
    tried, key = _TRIED.setdefault(vit, {}), (torch.get_num_threads(), images.dtype)
    if key not in tried:
        tried[key] = place_matters(vit, images, size)
    return 1 if tried[key] else size


def place_matters(vit: EvaViT, images: Tensor, size: int) -> bool:
    """Try it on noise of the shape and type of ``images``, in milliseconds.

    Sums in another order show in most tokens, so copies of one image show them. GELU, where it is not
    oneDNN's, rounds the numbers that fill no vector in another way, and those may be few; so it is tried on
    tensors that are all of that kind.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(images.shape[1:], generator=generator).to(images.dtype)
    tokens = vit(image.expand(size, -1, -1, -1).contiguous())
    numbers = torch.randn(2048, generator=generator).to(images.dtype)
    short = torch.cat([F.gelu(part) for part in numbers.split(7)])
    return not (torch.equal(tokens, tokens[:1].expand_as(tokens)) and torch.equal(short, F.gelu(numbers)))
