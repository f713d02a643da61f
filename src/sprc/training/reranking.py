"""The training of a re-ranker: each query's target against images that its first stage takes for it.

The first stage does not learn. It computes once, before the first epoch, what is needed of it: the sentence
prompt of each training query, its vector, and the features of the training images.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sprc.data.captions import process_caption
from sprc.data.datasets import TripletDataset
from sprc.data.images import Loader
from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.scoring.encoding import EncodedSplit, encode_split
from sprc.scoring.ranking import Ranking
from sprc.scoring.reranking import match_split, rank_again
from sprc.training.loop import EpochItems, order_of_epoch
from sprc.training.settings import TrainingSettings
from sprc.training.triplets import TrainingTriplets
from sprc.training.true_targets import TrueTargets, true_targets


class RerankItems(Dataset):
    """Queries with their target and K other images, as :class:`Blip2QformerCirRerank` takes them.

    At most half of the K are of the query's image set, drawn at random: R_s@1 asks to tell these apart. The
    others are targets of other queries of the same batch, drawn without repetition with the probability
    softmax(similarity / temp) that the first stage gives them, as BLIP-2 draws its wrong pairs. What the
    batch lacks is drawn from all training images. No true target of the query is drawn, and no reference
    where the benchmark leaves that out of its ranking.

    What is drawn depends on the seed, the epoch and the place in the order alone: not on the worker, the
    number of ranks, or what was read before.

    Args:
        triplets: to be trained on.
        encoded: by the first stage, a query a training text of each triplet, with prompts.
        first_rows: (T,), the row in ``encoded`` of each triplet's first text.
        targets: the true targets, rows of ``triplets.image_paths``.
        batch_size: of all ranks.
        per_query: K.
        temp: of the first stage.
        ranks_reference: whether the benchmark ranks a query's own reference.
    """

    def __init__(
        self,
        triplets: TripletDataset,
        encoded: EncodedSplit,
        first_rows: list[int],
        targets: TrueTargets,
        *,
        batch_size: int,
        per_query: int,
        temp: float,
        ranks_reference: bool,
    ) -> None:
        self.triplets, self.encoded, self.first_rows, self.targets = triplets, encoded, first_rows, targets
        self.batch_size, self.per_query, self.temp = batch_size, per_query, temp
        self.ranks_reference = ranks_reference
        self.names = list(triplets.image_paths)
        self.rows = {name: row for row, name in enumerate(self.names)}
        # Persistent workers keep the copy of this object that they were started with, see TripletDataset.
        self.order = torch.zeros(len(triplets), dtype=torch.int64).share_memory_()
        self.place = torch.zeros(len(triplets), dtype=torch.int64).share_memory_()
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, and with it which items make a batch."""
        self.triplets.set_epoch(epoch)
        self.epoch.fill_(epoch)
        self.order.copy_(order_of_epoch(len(self), self.triplets.seed, epoch))
        self.place[self.order] = torch.arange(len(self))

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, text = self.triplets.number(index), self.triplets.text(index)
        triplet = self.triplets.triplets[number]
        query = self.first_rows[number] + training_texts(triplet).index(text)
        images = [self.rows[cast(str, triplet.target)], *self.negatives(index, number, query)]
        load, paths = self.triplets.load, self.triplets.image_paths
        return {
            "prompts": cast(Tensor, self.encoded.prompts)[query],
            "text_input": process_caption(text),
            "candidates": torch.stack([load(paths[self.names[row]]) for row in images]),
        }

    def negatives(self, index: int, number: int, query: int) -> list[int]:
        """The K rows that item ``index`` is contrasted with: triplet ``number``, encoded as ``query``."""
        triplet, drawing = self.triplets.triplets[number], f"{self.triplets.seed} {self.epoch.item()} {index}"
        refused = set(self.targets.all[number].tolist())
        if not self.ranks_reference:
            refused.add(self.rows[triplet.reference])
        generator = random.Random(f"rerank {drawing}")
        of_set = [self.rows[name] for name in triplet.members if self.rows[name] not in refused]
        found = generator.sample(of_set, min(len(of_set), self.per_query // 2))
        start = int(self.place[index]) // self.batch_size * self.batch_size
        mates = [self.triplets.number(i) for i in self.order[start : start + self.batch_size].tolist()]
        pool = sorted(set(self.targets.own[mates].tolist()) - refused - set(found))
        wanted = self.per_query - len(found)
        if len(pool) > wanted:
            features, own = self.encoded.gallery[pool].float(), self.encoded.composed[query]
            similar = (features @ own).amax(dim=1) / self.temp
            # The largest of log p + Gumbel noise are a draw without repetition, and seeded on any machine.
            noise = torch.tensor([gumbel(generator) for _ in pool])
            pool = [pool[place] for place in (similar + noise).topk(wanted).indices.tolist()]
        found += pool
        if short := self.per_query - len(found):
            others = sorted(set(range(len(self.names))) - refused - set(found)) or found
            if not others:
                raise InputError("a training query has no other image than its targets; train on more images")
            draw = generator.sample if len(others) >= short else generator.choices
            found += draw(others, k=short)
        return found


def gumbel(generator: random.Random) -> float:
    """A draw of the standard Gumbel distribution."""
    return -math.log(max(generator.expovariate(1.0), 1e-300))


def training_texts(triplet: Triplet) -> tuple[str, ...]:
    """All texts that a triplet may be trained with, raw."""
    return triplet.training_captions or (triplet.caption,)


class Reranking:
    """What a re-ranker is trained on and how it is scored.

    Args:
        settings: complete.
        first_stage: on its device, in eval mode; it is read here and at the first validation.
        model: on its device.
        trained: the triplets, and the paths of their images and of their sets' members.
        scored: the splits of the validation.
        load: reads an image by its path.
    """

    objective: nn.Module | None = None  # the model itself

    def __init__(
        self,
        settings: TrainingSettings,
        first_stage: Blip2QformerCirAlignPrompt,
        model: Blip2QformerCirRerank,
        trained: TrainingTriplets,
        scored: list[Split],
        load: Loader,
    ) -> None:
        self.settings, self.model, self.scored, self.load = settings, model, scored, load
        self.temp = first_stage.temp.item()
        triplets = trained.dataset(load, settings)
        queries = [
            Triplet(triplet.pair_id, triplet.reference, triplet.target, text)
            for triplet in triplets.triplets
            for text in training_texts(triplet)
        ]
        counts = torch.tensor([len(training_texts(triplet)) for triplet in triplets.triplets])
        split = Split("train", queries, triplets.image_paths)
        reading = {**settings.reading, **settings.gallery, "with_prompts": True}
        encoded = encode_split(first_stage, split, load, **reading)
        # Where the processes that read images see it; what is drawn by it need not be exact.
        encoded = replace(encoded, gallery=encoded.gallery.to("cpu", torch.float16))
        self.items: EpochItems = RerankItems(
            triplets,
            encoded,
            (counts.cumsum(0) - counts).tolist(),
            true_targets(triplets.triplets, triplets.image_paths),
            batch_size=settings.batch_size,
            per_query=cast(int, settings.rerank_negatives),
            temp=self.temp,
            ranks_reference=scored[0].ranks_reference,
        )
        self.encoded = [encode_split(first_stage, split, load, **reading) for split in scored]

    def before_epoch(self, epoch: int, step: int, on_batch: Callable[[], None]) -> None:
        """Nothing has to be made: the first stage does not change."""

    def rankings(self, on_batch: Callable[[], None]) -> list[Callable[[], Ranking]]:
        """What ranks each validation split by both stages; ``on_batch`` as for ``match_split``."""
        found: list[Callable[[], Ranking]] = []
        for split, encoded in zip(self.scored, self.encoded, strict=True):
            matches = match_split(
                self.model,
                split,
                encoded,
                self.load,
                top=cast(int, self.settings.rerank_top),
                **self.settings.reading,
                on_batch=on_batch,
            )
            found.append(partial(rank_again, split, encoded, matches, temp=self.temp))
        return found
