"""What sprc_calls.py feeds: pictures as SPRC's scripts preprocess them, and captions. For Python 3.9 too."""

from PIL import Image
from torchvision import transforms

SIDE = 224
CAPTIONS = [
    "Make the circle blue.",
    "Remove the star!",
    "add a cross",
    "is LARGER, and red",
    "move it (left)",
]


def pixels(number):
    """A picture wider than 1.25 of its height, padded as their targetpad_transform does."""
    image = Image.new("RGBA", (190, 90), (37 * number % 256, 99, 251 - 40 * number, 255))
    image.paste((250, 250, 0, 255), (10 * number, 20, 40 + 10 * number, 60))
    width, height = image.size
    border = [max(int((max(width, height) / 1.25 - side) / 2), 0) for side in (width, height)]
    return transforms.Compose(
        [
            lambda image: transforms.functional.pad(image, [*border, *border], 0, "constant"),
            transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )(image)
