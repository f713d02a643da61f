"""A small training with more negatives than the batch's: eight images, sixteen triplets, a small model."""

import torch
from helpers.small_models import CAPTIONS, VOCABULARY, random_images, randomise, small_config

from sprc.data.datasets import TripletDataset
from sprc.data.split import Triplet
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.tokenizer import WordPiece
from sprc.run_folder import RunFolder
from sprc.training.loop import Trainer, TrainingConfig
from sprc.training.negatives import Negatives, choose_learning
from sprc.training.settings import TrainingSettings

IMAGES = [f"image{number}" for number in range(8)]
# Each image is a target; no query occurs twice.
TRIPLETS = [
    Triplet(number, IMAGES[number % 8], IMAGES[(3 * number + 1 + number // 8) % 8], CAPTIONS[number % 3])
    for number in range(16)
]


def make_model(**changes):
    model = Blip2QformerCirAlignPrompt(small_config(**changes), WordPiece(VOCABULARY))
    randomise(model)
    return model.to(torch.get_default_dtype())


def make_triplets(folder, config, triplets=TRIPLETS, seed=0):
    """The triplets; their images are files that hold nothing but a name, and pixels in memory."""
    pixels = dict(zip(IMAGES, random_images(len(IMAGES), config), strict=True))
    paths = {}
    for name in IMAGES:
        paths[name] = folder / name
        paths[name].write_text(name)
    dtype = torch.get_default_dtype()
    return TripletDataset(triplets, paths, lambda path: pixels[path.name].to(dtype), seed)


def make_negatives(folder, model, triplets=TRIPLETS, **flags):
    """What ``--negatives`` makes of them; ``flags`` as on the command line."""
    given = {"num_workers": 0, "batch_size": 4, **flags}
    settings = TrainingSettings(dataset="cirr", **given)
    settings.check()
    settings = TrainingSettings(dataset="cirr", **{**given, **settings.where_unset()})
    run_folder = RunFolder(folder)
    run_folder.checkpoints.mkdir(exist_ok=True, parents=True)
    choose_learning(model, settings.train)
    items = make_triplets(folder, model.config, triplets)
    return Negatives(settings, model, items, run_folder, ranks_reference=False)


def ready(negatives, epoch=0, step=0):
    negatives.before_epoch(epoch, step, lambda: None)
    return negatives


def make_trainer(folder, model, negatives, **config):
    settings = {"num_epochs": 3, "batch_size": 4, "num_workers": 0, "learning_rate": 1e-3, **config}
    trainer = Trainer(
        model, negatives.items, TrainingConfig(**settings), folder, objective=negatives.objective
    )
    trainer.before_epoch = lambda epoch, step: negatives.before_epoch(epoch, step, trainer.stop_if_asked)
    return trainer


def batch_of(negatives, numbers):
    """The items of these numbers, as the loader would collate them."""
    return torch.utils.data.default_collate([negatives.items[number] for number in numbers])
