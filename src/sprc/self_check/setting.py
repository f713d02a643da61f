"""What the checks run on: a device, shapes, and models, batches and pictures that are made, not fetched."""

import math
import random
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from sprc.config import ModelConfig
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Samples
from sprc.models.device import place, precision
from sprc.models.tokenizer import SPECIAL_TOKENS, WordPiece

Model = Blip2QformerCirAlignPrompt
LOSS_WEIGHTS = {"loss_itc": 1.0, "loss_rtc": 0.4, "loss_align": 0.4}  # CIRR's
SENTENCE = (
    "make the a same dog with its mouth open and on grass instead of wood remove person add more two fewer "
    "show closer view from side is lying down white black background different angle of breed facing left"
)
WORDS = SENTENCE.split()
FEW_WORDS = 200  # a vocabulary where the size of the published one would only cost time


class Shapes(NamedTuple):
    """How large the models and batches of the checks are."""

    told: str  # to the user
    model: dict[str, int]  # of ModelConfig, over BLIP-2's with ViT-g
    vit: dict[str, int]  # where it is the vision transformer that is checked
    layers: int  # of the Q-Former, where a CPU has to compute the same
    batch: int
    all_layers: int  # of the Q-Former, where speed and memory are measured
    large_batch: int
    picture: tuple[int, int]  # width and height


QUARTER = {"vit_width": 352, "vit_heads": 4, "hidden_size": 192, "num_heads": 3, "intermediate_size": 768}
QUARTER |= {"embed_dim": 64}
SMALL = {"image_size": 28, "vit_width": 32, "vit_heads": 2, "hidden_size": 32, "num_heads": 2}
SMALL |= {"intermediate_size": 48, "num_query_tokens": 4, "embed_dim": 8}
SHAPES = {
    "true": Shapes("true shapes (ViT-g, BLIP-2's Q-Former)", {}, {"vit_depth": 39}, 2, 4, 12, 64, (640, 480)),
    "quarter": Shapes(
        "a quarter of the true widths, 4 blocks of ViT-g",
        QUARTER,
        {"vit_depth": 4, "vit_width": 1408, "vit_heads": 16},
        2,
        4,
        2,
        4,
        (640, 480),
    ),
    "small": Shapes("small shapes, whose figures say little", SMALL, {"vit_depth": 2}, 2, 4, 2, 8, (64, 48)),
}


@dataclass(frozen=True)
class Setting:
    """What a check is given."""

    device: torch.device
    shapes: Shapes
    folder: Path  # temporary

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to be checked."""
        return self.device.type == "cuda"

    def model(self, *, layers: int | None = None, words: int = FEW_WORDS, **changes: Any) -> Model:
        """A seeded model on the CPU in float32, in training mode; its vision transformer has one block."""
        values: dict[str, Any] = {"vit_depth": 1, "vocab_size": words}
        values["num_layers"] = layers or self.shapes.layers
        width = ModelConfig(**cast(Any, self.shapes.model)).hidden_size
        # BERT's 0.02 leaves random layers nearly blind to what they read.
        values["initializer_range"] = width**-0.5
        config = ModelConfig(**{**self.shapes.model, **values, **changes})
        tokenizer = made_tokenizer(words)
        torch.manual_seed(0)
        return Model(config, tokenizer)

    def placed(self, model: Model) -> Model:
        """A copy of ``model`` on the device, as training places it."""
        return place(deepcopy(model), self.device)

    def samples(self, config: ModelConfig, count: int, first: int = 0) -> Samples:
        """``count`` triplets on the CPU, as a feature cache in float16 gives them."""
        triplets = MadeTriplets(config, first + count)
        items = [triplets[number] for number in range(first, first + count)]
        return {
            "image": torch.stack([item["image"] for item in items]),
            "target": torch.stack([item["target"] for item in items]),
            "text_input": [item["text_input"] for item in items],
        }

    def on_device(self, samples: Samples) -> Samples:
        """The samples with their tensors on the device."""
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in samples.items()}

    def autocast(self, amp: str) -> AbstractContextManager:
        """The context in which ``--amp`` computes here."""
        dtype = precision(amp, self.device)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def synchronise(self) -> None:
        """Wait for the GPU, so that a clock sees its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give unused memory back to the GPU."""
        if self.on_gpu:
            torch.cuda.empty_cache()


class MadeTriplets(Dataset):
    """Triplets of noise as a feature cache gives them: (N, D) tokens in float16, and a caption."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        self.shape = (2, config.num_patches**2 + 1, config.vit_width)
        self.count = count

    def set_epoch(self, epoch: int) -> None:
        """Nothing is drawn by epoch."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, target = torch.randn(self.shape, generator=torch.Generator().manual_seed(index)).half()
        return {"image": image, "target": target, "text_input": caption(index)}


def made_tokenizer(size: int) -> WordPiece:
    """A tokenizer of ``size`` entries, [DEC] among them, that has each of ``WORDS`` as one."""
    vocabulary = [*SPECIAL_TOKENS, *dict.fromkeys(WORDS)]
    return WordPiece([*vocabulary, *(f"unused{number}" for number in range(size - 1 - len(vocabulary)))])


def caption(index: int) -> str:
    """A made caption of 3 to 20 words."""
    draw = random.Random(index)
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 20)))


def fill_vit(model: Model, depth: int) -> None:
    """Give ``model`` a vision transformer of ``depth`` blocks: drawing a billion numbers takes half a minute.

    So one block is drawn, and each of the others has its numbers in another order.
    """
    with torch.device("meta"):
        vit = model.vision_transformer(ModelConfig(**{**vars(model.config), "vit_depth": depth}))
    vit = vit.to_empty(device="cpu").requires_grad_(False)
    drawn = model.visual_encoder.state_dict()
    for name, value in vit.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        source = drawn[name.replace(f"blocks.{block}.", "blocks.0.", 1)]
        value.data.copy_(source.flatten().roll(1009 * block).view_as(source))
    model.visual_encoder = vit.eval()


def pixels(config: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """(count, 3, S, S) of noise, as the preprocessing leaves a picture."""
    shape = (count, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Files of CIRR's kind, PNG and JPEG in turns: discs over a gradient, with some noise."""
    folder.mkdir(exist_ok=True)
    draw_numbers = np.random.default_rng(0)
    width, height = size
    slope = np.linspace(0, 150, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    paths = []
    for number in range(count):
        noise = draw_numbers.normal(0, 6, (height, width, 3))
        picture = Image.fromarray((slope + noise + 20).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for x, y, *color in draw_numbers.integers(0, 256, (12, 5)).tolist():
            left, top = x * width // 256, y * height // 256
            draw.ellipse([left, top, left + width // 6, top + height // 5], fill=tuple(color))
        paths.append(folder / f"{number}.{('png', 'jpg')[number % 2]}")
        picture.save(paths[-1])
    return paths


def weighted(losses: dict[str, Tensor]) -> Tensor:
    """The loss that training takes the gradient of."""
    return cast(Tensor, sum(LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()))


def take_gradients(model: Model, scale: float = 1.0) -> dict[str, Tensor]:
    """Each gradient on the CPU in float64, divided by ``scale``; the model then has none."""
    found = {
        name: parameter.grad.cpu().double() / scale
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, all tensors taken together."""
    apart = sum(float((found[name] - value).square().sum()) for name, value in wanted.items())
    return math.sqrt(apart / sum(float(value.square().sum()) for value in wanted.values()))
