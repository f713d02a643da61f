"""A small first stage, re-rankers for it, and a split that both look at."""

from pathlib import Path

import torch
from helpers.small_models import CAPTIONS, VOCABULARY, random_images, randomise, small_config

from sprc.config import RERANKER
from sprc.data.split import Split, Triplet
from sprc.distributed import rank
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.reranker import start_reranker
from sprc.models.tokenizer import WordPiece
from sprc.training.loop import Trainer, TrainingConfig
from sprc.training.reranking import Reranking
from sprc.training.settings import TrainingSettings
from sprc.training.triplets import TrainingTriplets

IMAGES = [f"picture{number}" for number in range(11)]


def make_first_stage(seed=0, **changes):
    model = Blip2QformerCirAlignPrompt(small_config(**changes), WordPiece(VOCABULARY))
    randomise(model, seed)
    return model.eval()


def make_reranker(first_stage, seed=1):
    """A re-ranker whose weights are not the first stage's any more, but for the vision transformer."""
    model = start_reranker(first_stage)
    vit = {name: value.clone() for name, value in model.visual_encoder.state_dict().items()}
    randomise(model, seed)
    model.visual_encoder.load_state_dict(vit)
    return model.eval()


def make_triplets(count=10):
    """Sets of three and of four; of some queries the target is in the set's other half of the gallery."""
    triplets = []
    for number in range(count):
        reference, target = (IMAGES[(3 * number + step) % 11] for step in (0, 1 + number % 4))
        members = [IMAGES[(3 * number + step) % 11] for step in (5, 6)[: 1 + number % 2]]
        triplets.append(
            Triplet(number, reference, target, CAPTIONS[number % 3], (*members, target, reference))
        )
    return triplets


def make_split(ranks_reference=False):
    """Eleven images and ten queries; with ``ranks_reference`` as FashionIQ has them, without sets."""
    triplets = make_triplets()
    if ranks_reference:
        triplets = [Triplet(one.pair_id, one.reference, one.target, one.caption) for one in triplets]
    paths = {name: Path("folder") / name for name in IMAGES}
    return Split("val", triplets, paths, ranks_reference=ranks_reference)


class Pixels:
    """Reads the images: random ones by their names. ``read`` are the names that were asked for."""

    def __init__(self, config):
        self.images = dict(zip(IMAGES, random_images(len(IMAGES), config), strict=True))
        self.read = []

    def __call__(self, path):
        self.read.append(path.name)
        return self.images[path.name].to(torch.get_default_dtype())


def make_task(folder, first_stage, model, triplets=None, **flags):
    """What a re-ranker is trained on, with images as :class:`Pixels` has them; each is a file of its own."""
    paths = {name: folder / name for name in IMAGES}
    for name, path in paths.items():
        if rank() == 0:  # which alone reads them
            path.write_text(name)
    given = {"num_workers": 0, "batch_size": 4, "rerank_negatives": 4, "rerank_top": 3, **flags}
    settings = TrainingSettings(
        dataset="cirr", blip_model_name=RERANKER, model_path=Path("first.pt"), **given
    )
    settings.check_reranker()
    trained = TrainingTriplets(make_triplets(12) if triplets is None else triplets, [], paths, [])
    return Reranking(settings, first_stage, model, trained, [make_split()], Pixels(first_stage.config))


def make_trainer(folder, model, task, **config):
    """Three steps an epoch."""
    (folder / "saved_models").mkdir(exist_ok=True)
    settings = {"num_epochs": 3, "batch_size": 4, "num_workers": 0, "learning_rate": 1e-3, **config}
    return Trainer(model, task.items, TrainingConfig(**settings), folder)
