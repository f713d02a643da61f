"""From a PIL image to the vision transformer's input."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sprc.data import TRANSFORMS
from sprc.errors import InputError

# CLIP's statistics of RGB images scaled to 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def make_transform(kind: str, image_size: int, target_ratio: float = 1.25) -> Callable[[Image.Image], Tensor]:
    """Build the deterministic preprocessing, the same for training and scoring.

    ``kind`` "targetpad" pads an image whose longer side is at least ``target_ratio`` times the shorter,
    up to that ratio; "squarepad" pads to a square. Then: short side to ``image_size`` (bicubic,
    antialiased), centre crop, RGB, scale to 0..1, normalise by CLIP's mean and standard deviation.

    Returns a function from a PIL image to a float32 tensor (3, image_size, image_size).
    Raises :class:`InputError` for an unknown ``kind`` or a ``target_ratio`` that is not finite or is below 1.
    """
    if kind not in TRANSFORMS:
        raise InputError(f"--transform {kind!r} is unknown; choose from {', '.join(TRANSFORMS)}")
    if not 1 <= target_ratio < math.inf:
        raise InputError(
            f"--target-ratio {target_ratio} is not a finite number of at least 1; the default is 1.25"
        )
    # A square is the ratio 1, which every image reaches.
    return partial(_preprocess, image_size=image_size, ratio=target_ratio if kind == "targetpad" else 1.0)


def _preprocess(image: Image.Image, image_size: int, ratio: float) -> Tensor:
    image = _pad(to_eight_bits(image), ratio)
    width, height = image.size
    shorter = min(width, height)
    # torchvision's rounding, which published checkpoints were trained with; a test compares the two.
    # Importing torchvision itself would nearly double the start of every script.
    width, height = (int(image_size * side / shorter) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - image_size) / 2) for side in (width, height))
    image = image.crop((left, top, left + image_size, top + image_size))
    # RGB comes after the geometry because published checkpoints were trained so; it matters only for
    # images with a palette or with transparency.
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return pixels.float().div(255).sub_(mean).div_(std)


def _pad(image: Image.Image, ratio: float) -> Image.Image:
    """Pad the shorter side with zeros to ``longer / ratio``, the same on both ends."""
    width, height = image.size
    longer = max(width, height)
    if longer / min(width, height) < ratio:
        return image
    horizontal = max(int((longer / ratio - width) / 2), 0)
    vertical = max(int((longer / ratio - height) / 2), 0)
    if horizontal == vertical == 0:
        return image
    padded = ImageOps.expand(image, (horizontal, vertical), fill=0)
    if image.mode == "P" and (palette := image.getpalette()):
        padded.putpalette(palette)
    return padded


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip nearly all of it to white."""
    # Older Pillows open a 16-bit PNG in mode "I".
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8))
    return image


def denormalise(image: Tensor) -> Tensor:
    """Undo the normalisation: (3, S, S) as the model takes it to (3, S, S) in 0..1, to be looked at."""
    mean, std = (image.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (image * std + mean).clamp(0, 1)


def upright_first(transform: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], Tensor]:
    """``transform`` of the picture as viewers show it: turned as its EXIF data say, which cameras write.

    Training and validation take pictures as they are stored, as SPRC does.
    """
    return partial(_transform_upright, transform=transform)


def _transform_upright(image: Image.Image, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    return transform(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; broken data say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of almost any kind, out of broken bytes
        return image
