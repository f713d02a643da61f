"""Made scenes with descriptions: what `tiny` is pre-trained on. No edit is ever shown."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sprc.data.synthetic.descriptions import describe, random_scene
from sprc.data.synthetic.scenes import Scene, render


def draw_scenes(count: int, seed: int, used: set[Scene]) -> list[Scene]:
    """``count`` different scenes, none of which is in ``used``, to which they are added."""
    rng = random.Random(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng)
        if scene not in used:
            used.add(scene)
            found.append(scene)
    return found


class DescribedScenes(Dataset):
    """Scenes and their descriptions, another one in each epoch.

    An item is ``{"image": (3, S, S) pixels, "text_input": str}``. The description depends on the seed, the
    epoch and the index alone.

    Args:
        scenes: rendered once, and kept as bytes.
        transform: see :func:`sprc.data.transforms.make_transform`.
        image_size: S.
        seed: of the descriptions.
    """

    def __init__(
        self, scenes: list[Scene], transform: Callable[[Image.Image], Tensor], image_size: int, seed: int
    ) -> None:
        self.scenes, self.transform, self.seed = scenes, transform, seed
        shown = tqdm(scenes, desc="render scenes", unit="scene", leave=False)
        self.pixels = [np.asarray(render(scene, image_size)) for scene in shown]
        # Told to workers that live on, see TripletDataset.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw the descriptions of ``epoch`` from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        rng = random.Random(f"{self.seed} {self._epoch.item()} {index}")
        return {
            "image": self.transform(Image.fromarray(self.pixels[index])),
            "text_input": describe(self.scenes[index], rng),
        }
