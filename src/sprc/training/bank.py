"""A bank of all training images' target features, which queries are contrasted with in place of the batch's.

After SPN4CIR (Feng et al., ACM MM 2024), whose second stage does so after SPRC's training. The model computes
the features by its own target's call, in eval mode and in full precision as in validation; between two such
times they are fixed, and the model goes on without them.
"""

import math

import torch
from torch import Tensor

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.losses import bank_loss
from sprc.training.true_targets import TrueTargets, excluded

# Images of the bank whose products with a batch stand in memory at once.
CHUNK = {"cpu": 256, "cuda": 4096}


class Bank:
    """The loss over a bank, and the bank.

    Args:
        targets: for each triplet, which rows of the bank are no negatives.
        temp: the temperature.
        positive: "current", the target's features as this step computes them, or "bank", those in the bank.
    """

    def __init__(self, targets: TrueTargets, temp: float, positive: str) -> None:
        self.targets, self.temp, self.positive = targets, temp, positive
        self.features = torch.empty(0)  # (K, Q, E), from the first epoch on

    def fill(self, features: Tensor, device: torch.device) -> None:
        """Contrast with ``features``, (K, Q, E) of any floating type, from now on."""
        self.features = features.to(device)
        self.targets = TrueTargets(*(rows.to(device) for rows in self.targets))

    def loss(self, queries: Tensor, current: Tensor, numbers: Tensor) -> Tensor:
        """See :func:`sprc.models.losses.bank_loss`.

        Args:
            queries: (B, E), normalised.
            current: (B, Q, E), the targets' features of this step.
            numbers: (B,) of the triplets.
        """
        bank = self.features
        positives = current if self.positive == "current" else bank[self.targets.own[numbers]]
        masked = excluded(self.targets.all[numbers], len(bank))
        chunk = CHUNK.get(queries.device.type, CHUNK["cpu"])
        return bank_loss(queries, bank, positives, self.temp, masked, chunk)


def bank_shape(images: int, model: Blip2QformerCirAlignPrompt) -> tuple[int, int, int]:
    """Of the bank of so many images."""
    return images, model.config.num_query_tokens, model.config.embed_dim


def size_in_words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """How many images a bank has, and what it takes."""
    return f"{shape[0]:,} images, {math.prod(shape) * dtype.itemsize / 1e6:,.0f} MB"
