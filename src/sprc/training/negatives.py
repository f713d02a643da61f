"""What a query is contrasted with beyond its batch: a bank of all training images, images mined for it.

The loop sees a module that gives losses, as the model does, and calls :meth:`Negatives.before_epoch`. What is
made there, features of the bank and draws of the mining, depends on the weights of that moment. So it goes to
the run's folder, and a run that goes on within an epoch reads it.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sprc.data.datasets import TripletDataset
from sprc.data.split import Split
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.losses import pairwise_loss
from sprc.run_folder import RunFolder
from sprc.scoring.encoding import EncodedSplit, encode_split
from sprc.training.bank import Bank, bank_shape, size_in_words
from sprc.training.epoch_file import EpochFile
from sprc.training.mining import Miner
from sprc.training.settings import TrainingSettings
from sprc.training.true_targets import true_targets

# What --train lets learn, by parameters' names; what requires no gradient in any case stays as it is.
LEARNS = {
    "all": re.compile(""),
    # Call 3 alone reads vision_proj. All else that it reads, calls 1 and 2 read, too.
    "query": re.compile(r"(?!vision_proj\.)"),
    # What call 2 reads and call 3 does not, but for the words' embeddings: the targets stay as in the bank.
    "call2": re.compile(r"text_proj\.|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."),
}


def choose_learning(model: nn.Module, what: str) -> None:
    """Take the gradient from all parameters that ``what``, a key of :data:`LEARNS`, does not let learn."""
    for name, parameter in model.named_parameters():
        if not LEARNS[what].match(name):
            parameter.requires_grad_(False)


class WiderNegatives(nn.Module):
    """A model whose losses see more negatives than the batch's. To the loop it is a model.

    With a bank `loss_bank` takes the place of `loss_itc`; with mined images there is `loss_mined` as well.

    Args:
        model: on its device.
        bank: or None.
        learn_targets: whether the targets' features, and those of mined images, get a gradient.
    """

    def __init__(self, model: Blip2QformerCirAlignPrompt, bank: Bank | None, *, learn_targets: bool) -> None:
        super().__init__()
        self.model, self.bank, self.learn_targets = model, bank, learn_targets

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """The model's."""
        return self.model.diagnostics

    @diagnostics.setter
    def diagnostics(self, values: dict[str, Tensor]) -> None:
        self.model.diagnostics = values

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch of :class:`NegativeItems`: unweighted scalars."""
        return self.losses_of(self.embed(samples))

    def read_images(self, samples: dict[str, Any]) -> dict[str, Any]:
        """As the model does, and likewise for the mined images."""
        found = self.model.read_images(samples)
        if self.model.config.freeze_vit and "negative" in samples and samples["negative"].dim() == 5:
            images = samples["negative"]
            tokens = self.model.vit_tokens(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            found = {**found, "negative": tokens}
        return found

    def embed(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """What the model gives; `triplet`, (B,) numbers; and `negatives`, (B, P, Q, E), of mined images."""
        rows = {**self.model.embed(samples), "triplet": samples["triplet"]}
        with torch.set_grad_enabled(self.learn_targets and torch.is_grad_enabled()):
            if "negative" in samples:
                images = samples["negative"]
                tokens = self.model.vit_tokens(images.flatten(0, 1))
                features = self.model.target_features(self.model.to_be_read(tokens))
                rows["negatives"] = features.unflatten(0, images.shape[:2])
        if not self.learn_targets:
            rows["target"] = rows["target"].detach()
        return rows

    def losses_of(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses, from what :meth:`embed` gives. A rank's are the means of its own rows."""
        losses = self.model.losses_of(embeddings)
        queries, targets = embeddings["query"], embeddings["target"]
        if self.bank is not None:
            del losses["loss_itc"]
            losses = {"loss_bank": self.bank.loss(queries, targets, embeddings["triplet"]), **losses}
        if "negatives" in embeddings:
            negatives, temp = embeddings["negatives"], embeddings["temp"]
            losses["loss_mined"] = pairwise_loss(queries, targets, negatives, temp)
        return losses


class NegativeItems(Dataset):
    """The items of ``triplets`` with `triplet`, their number; and `negative`, (P, ...), of mined images.

    Args:
        triplets: to be trained on.
        per_query: P; 0 where nothing is mined.
    """

    def __init__(self, triplets: TripletDataset, per_query: int = 0) -> None:
        self.triplets = triplets
        self.paths: list[Path] = list(triplets.image_paths.values())
        # Persistent workers keep the copy of this object that they were started with, see TripletDataset.
        self.mined = torch.zeros(len(triplets.triplets), per_query, dtype=torch.int32).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Tell the triplets the epoch."""
        self.triplets.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.triplets.number(index)
        item = {**self.triplets[index], "triplet": number}
        if self.mined.shape[1]:
            images = [self.triplets.load(self.paths[row]) for row in self.mined[number].tolist()]
            item["negative"] = torch.stack(images)
        return item


class Negatives:
    """What ``--negatives`` makes of a training: items, the module that gives losses, what epochs begin with.

    Args:
        settings: complete, ``kinds`` not empty.
        model: on its device; :func:`choose_learning` has been told what learns.
        triplets: to be trained on, all with targets.
        run_folder: where bank and draws go.
        ranks_reference: whether the benchmark ranks a query's own reference.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        model: Blip2QformerCirAlignPrompt,
        triplets: TripletDataset,
        run_folder: RunFolder,
        *,
        ranks_reference: bool,
    ) -> None:
        self.settings, self.model, self.triplets = settings, model, triplets
        targets = true_targets(triplets.triplets, triplets.image_paths)
        self.bank = self.miner = None
        if "bank" in settings.kinds:
            temp, positive = cast(float, settings.bank_temperature), cast(str, settings.bank_positive)
            self.bank = Bank(targets, temp, positive)
        if "mined" in settings.kinds:
            self.miner = Miner(
                targets,
                cast(str, settings.mining_rule),
                cast(int, settings.negatives_per_query),
                cast(int, settings.mine_every),
                settings.seed,
                ranks_reference,
            )
        self.items = NegativeItems(triplets, self.miner.per_query if self.miner else 0)
        self.objective = WiderNegatives(model, self.bank, learn_targets=settings.train == "all")
        self.bank_file = EpochFile(run_folder.bank, "--negatives bank")
        self.mined_file = EpochFile(run_folder.mined, "--negatives mined")
        self.drawn_for: int | None = None  # the epoch that the draws at hand begin with
        self.drawn = torch.empty(0)  # (M, T, P)
        self.filled_in: int | None = None  # the epoch that the bank at hand is of

    def before_epoch(self, epoch: int, step: int, on_batch: Callable[[], None]) -> None:
        """Have ready what ``epoch`` needs: made anew where it is due, else as it is or from the disk.

        Args:
            epoch: that begins or goes on.
            step: of it that are done; above 0 nothing can be made, as the weights are others by now.
            on_batch: is called after each batch of images, on all ranks alike; what it raises ends it.

        Raises:
            InputError: a file that is needed is missing or broken.
        """
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # or a run that reads what another made would go on otherwise
            encoded = None
            if self.miner is not None:
                encoded = self._mine(epoch, step, on_batch)
            if self.bank is not None:
                self._fill(epoch, step, encoded, on_batch)

    def _mine(self, epoch: int, step: int, on_batch: Callable[[], None]) -> EncodedSplit | None:
        """Bring the draws up to date; what was encoded for them, if anything."""
        miner, encoded = cast(Miner, self.miner), None
        due = epoch - epoch % miner.every
        if (epoch, step) == (due, 0):
            encoded = self._encode(with_queries=True, dtype="float32", on_batch=on_batch)
            self.drawn = miner.draw(encoded, epoch)
            self.mined_file.write(epoch, self.drawn)
        elif self.drawn_for != due:
            shape = (miner.every, len(self.triplets.triplets), miner.per_query)
            self.drawn = self.mined_file.read(due, shape, torch.int32)
        self.drawn_for = due
        self.items.mined.copy_(self.drawn[epoch - due])
        return encoded

    def _fill(
        self, epoch: int, step: int, encoded: EncodedSplit | None, on_batch: Callable[[], None]
    ) -> None:
        """Bring the bank up to date; ``encoded`` spares it the encoding."""
        bank, every, name = (
            cast(Bank, self.bank),
            self.settings.refresh_bank,
            cast(str, self.settings.bank_dtype),
        )
        due = 0 if every is None else epoch - epoch % every
        shape, dtype = bank_shape(len(self.items.paths), self.model), getattr(torch, name)
        if (epoch, step) == (due, 0):
            if encoded is None:
                encoded = self._encode(with_queries=False, dtype=name, on_batch=on_batch)
            features = encoded.gallery.to(dtype)
            self.bank_file.write(epoch, features)
            print(f"bank of epoch {epoch}: {size_in_words(shape, dtype)} in {name}", flush=True)
        elif self.filled_in != due:
            features = self.bank_file.read(due, shape, dtype)
        else:
            return
        bank.fill(features, self.model.device)
        self.filled_in = due

    def _encode(self, *, with_queries: bool, dtype: str, on_batch: Callable[[], None]) -> EncodedSplit:
        """The training images as targets, and the training queries."""
        # A set's members need not be among the images, and nothing asks for ranks within sets here.
        queries = [replace(triplet, members=()) for triplet in self.triplets.triplets] if with_queries else []
        return encode_split(
            self.model,
            Split("train", queries, self.triplets.image_paths),
            self.triplets.load,
            **self.settings.reading,
            gallery_dtype=dtype,
            on_batch=on_batch,
        )
