import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sprc.data import TRANSFORMS
from sprc.data.transforms import make_transform
from sprc.errors import InputError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def noise(width, height, mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def padded_size(width, height, ratio):
    """Width and height after padding, from the written rule: only the shorter side, up to longer / ratio."""
    short, long = sorted((width, height))
    if long / short < ratio:
        return width, height
    half = int(max(long / ratio - short, 0) / 2)
    return (width + 2 * half, height) if width < height else (width, height + 2 * half)


def restated(image, size, ratio):
    """Section 4's preprocessing on arrays; only the bicubic kernel is Pillow's."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    new_width, new_height = padded_size(width, height, ratio)
    canvas = np.zeros((new_height, new_width, *pixels.shape[2:]), np.uint8)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    short = min(new_width, new_height)
    target = (size * new_width // short, size * new_height // short)
    pixels = np.asarray(Image.fromarray(canvas).resize(target, Image.Resampling.BICUBIC))
    top, left = round((target[1] - size) / 2), round((target[0] - size) / 2)
    pixels = pixels[top : top + size, left : left + size]
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)


def image_sizes(count):
    draw = random.Random(7)
    drawn = [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(count)]
    # At the ratio 1.25 exactly, one beside it, squares, the final size, one-pixel sides.
    return [*drawn, (50, 40), (40, 50), (51, 40), (49, 40), (33, 33), (32, 32), (1, 90), (90, 1), (1, 1)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "ratio"), [("targetpad", 1.25), ("targetpad", 1.7), ("squarepad", 1.0)])
def test_transform_equals_its_restatement_on_arrays(kind, ratio, mode):
    transform = make_transform(kind, 32, ratio)
    for seed, (width, height) in enumerate(image_sizes(60)):
        image = noise(width, height, mode, seed)
        found = transform(image)
        assert found.dtype == torch.float32
        assert found.shape == (3, 32, 32)
        np.testing.assert_allclose(
            found.numpy(), restated(image, 32, ratio), atol=1e-5, err_msg=f"{image.size}"
        )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_transform_equals_torchvision_s_to_the_bit(mode):
    """Published checkpoints were trained through torchvision."""
    torchvision = pytest.importorskip("torchvision.transforms")
    after_padding = torchvision.Compose(
        [
            torchvision.Resize(32, torchvision.InterpolationMode.BICUBIC),
            torchvision.CenterCrop(32),
            lambda image: image.convert("RGB"),
            torchvision.ToTensor(),
            torchvision.Normalize(MEAN.tolist(), STD.tolist()),
        ]
    )
    for seed, (width, height) in enumerate(image_sizes(30)):
        image = noise(width, height, "RGBA", seed).convert(mode)
        new_width, new_height = padded_size(width, height, 1.25)
        border = [(new_width - width) // 2, (new_height - height) // 2]
        expected = after_padding(torchvision.functional.pad(image, border, fill=0))
        assert torch.equal(make_transform("targetpad", 32)(image), expected), image


def test_squarepad_does_not_depend_on_the_target_ratio():
    image = noise(60, 31)
    assert torch.equal(make_transform("squarepad", 32, 1.5)(image), make_transform("squarepad", 32)(image))


def test_targetpad_pads_from_the_ratio_on_and_not_below():
    transform = make_transform("targetpad", 40, 1.25)
    black = torch.tensor((0 - MEAN) / STD, dtype=torch.float32)
    white = torch.tensor((1 - MEAN) / STD, dtype=torch.float32)

    def left_edge(width, height):
        return transform(Image.new("RGB", (width, height), "white"))[:, 20, 0]

    torch.testing.assert_close(left_edge(84, 100), white)  # ratio 1.19: untouched
    torch.testing.assert_close(left_edge(80, 100), white)  # the ratio itself: there is nothing to add
    torch.testing.assert_close(left_edge(40, 100), black)  # ratio 2.5: 40 is padded to 80


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (40, 30), (32, 32)])
def test_every_image_mode_gives_a_finite_tensor(kind, mode, size):
    found = make_transform(kind, 32)(Image.new(mode, size))
    assert found.shape == (3, 32, 32)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_keeps_its_brightness(kind, dtype):
    grey = noise(50, 30, "L")
    sixteen_bits = Image.fromarray(np.asarray(grey).astype(dtype) * 257)
    transform = make_transform(kind, 32)
    assert torch.equal(transform(sixteen_bits), transform(grey))


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_palette_image_keeps_its_colours(kind):
    palette = noise(32, 32).quantize(16)
    assert torch.equal(make_transform(kind, 32)(palette), make_transform(kind, 32)(palette.convert("RGB")))


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform_survives_pickling_and_repeats_itself(kind):
    transform = make_transform(kind, 32)
    copy = pickle.loads(pickle.dumps(transform))  # a DataLoader's workers get it so, where they are spawned
    image = noise(70, 41)
    assert torch.equal(transform(image), copy(image))


def test_unknown_transform_is_refused_with_the_choices():
    with pytest.raises(
        InputError, match="--transform 'cirlcepad' is unknown; choose from targetpad, squarepad"
    ):
        make_transform("cirlcepad", 32)


@pytest.mark.parametrize("ratio", [0.99, 0.0, -1.25, float("nan"), float("inf")])
def test_impossible_target_ratio_is_refused(ratio):
    with pytest.raises(InputError, match=f"--target-ratio {ratio} "):
        make_transform("targetpad", 32, ratio)
