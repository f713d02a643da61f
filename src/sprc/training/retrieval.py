"""The training of a retriever: its items, what gives its losses, how it is validated."""

from collections.abc import Callable
from functools import partial

from torch import nn

from sprc.data.images import Loader
from sprc.data.split import Split
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.run_folder import RunFolder
from sprc.scoring.encoding import encode_split
from sprc.scoring.ranking import Ranking
from sprc.scoring.recall import rank_split
from sprc.training.loop import EpochItems
from sprc.training.negatives import Negatives
from sprc.training.settings import TrainingSettings
from sprc.training.triplets import TrainingTriplets


class Retrieval:
    """What is trained on and how it is scored.

    Args:
        settings: complete.
        model: on its device.
        trained: the triplets.
        scored: the splits of the validation.
        load: reads an image by its path.
        folder: of the run.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        model: Blip2QformerCirAlignPrompt,
        trained: TrainingTriplets,
        scored: list[Split],
        load: Loader,
        folder: RunFolder,
    ) -> None:
        self.settings, self.model, self.scored, self.load = settings, model, scored, load
        triplets = trained.dataset(load, settings)
        self.items: EpochItems = triplets
        self.objective: nn.Module | None = None
        self.negatives = None
        if settings.kinds:
            ranks_reference = scored[0].ranks_reference
            self.negatives = Negatives(settings, model, triplets, folder, ranks_reference=ranks_reference)
            self.items, self.objective = self.negatives.items, self.negatives.objective

    def before_epoch(self, epoch: int, step: int, on_batch: Callable[[], None]) -> None:
        """See :meth:`sprc.training.negatives.Negatives.before_epoch`."""
        if self.negatives is not None:
            self.negatives.before_epoch(epoch, step, on_batch)

    def rankings(self, on_batch: Callable[[], None]) -> list[Callable[[], Ranking]]:
        """What ranks each validation split by the model as it is; ``on_batch`` as for ``encode_split``."""
        reading = {**self.settings.reading, **self.settings.gallery, "on_batch": on_batch}
        return [
            partial(rank_split, split, encode_split(self.model, split, self.load, **reading))
            for split in self.scored
        ]
