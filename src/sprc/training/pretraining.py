"""From the settings of ``pretrain_tiny.py`` to a file of weights: scenes, first stage, backbone."""

import hashlib
import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sprc.config import ModelConfig, read_backbone
from sprc.data.reading import read_json
from sprc.data.synthetic.described import DescribedScenes, draw_scenes
from sprc.data.synthetic.descriptions import held_out_scenes
from sprc.data.transforms import make_transform
from sprc.errors import InputError, Interrupted
from sprc.files import write_atomically, write_json
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.device import memory_explained, place, start_device
from sprc.models.factory import NEW_PARAMETERS, load_backbone, tokenizer_of
from sprc.models.losses import similarity
from sprc.run_folder import RunFolder
from sprc.scoring.encoding import eval_mode
from sprc.training.first_stage import FirstStage
from sprc.training.loop import Trainer
from sprc.training.optimisation import TrainingConfig
from sprc.training.settings import LoopSettings, PretrainingSettings
from sprc.training.trackers import Trackers, require_trackers

BACKBONE = "tiny"
HELD_OUT = 1000  # scenes that are described and never trained on


def pretrain(settings: PretrainingSettings) -> Path:
    """Train the whole model on described scenes; write the weights and return where.

    The same call again goes on where a run was stopped.

    Raises:
        InputError: a setting that cannot work, or ``settings.out`` holds a run of other settings.
        Interrupted: a signal asked the run to stop; its state is saved.
    """
    settings.check_trackers()
    require_trackers(settings.trackers)
    device = start_device(settings.device)
    config = TrainingConfig(
        **{
            one.name: getattr(settings, one.name)
            for one in fields(LoopSettings)
            if hasattr(settings, one.name)
        },
        schedule_epochs=settings.num_epochs,
        warm_up=0.1,
    )
    if settings.scenes < settings.batch_size:
        raise InputError(
            f"--scenes {settings.scenes} do not fill a batch; give {settings.batch_size} or more"
        )
    folder = RunFolder(settings.out)
    open_folder(folder, settings)
    torch.manual_seed(config.seed)
    stage = place(FirstStage(untrained_model()), device)
    training, held_out = make_scenes(settings, stage.model.config)
    trainer = Trainer(stage, training, config, folder)
    trainer.load_state()

    def validate(_: Any) -> dict[str, float]:
        scores = score(stage, held_out, config.batch_size)
        print(f"epoch {trainer.progress.epoch}: {told(scores)}", flush=True)
        return scores

    try:
        with (
            memory_explained(device, config.batch_size, ["a smaller --batch-size"]),
            Trackers.start(settings.trackers, folder, what_decides(settings)) as trainer.trackers,
        ):
            trainer.train(validate, lambda *_: None)
    except Interrupted as stop:
        print(f"stopped by {stop}; the same command goes on", flush=True)
        raise
    return finish(stage, held_out, settings)


def untrained_model() -> Blip2QformerCirAlignPrompt:
    """The backbone's model with random weights, the vision transformer to be trained, fusion off."""
    values = {**read_backbone(BACKBONE)["model"], "freeze_vit": False, "use_gated_fusion": False}
    config = ModelConfig.from_dict(values, f"backbone {BACKBONE}")
    return Blip2QformerCirAlignPrompt(config, tokenizer_of(BACKBONE))


def open_folder(folder: RunFolder, settings: PretrainingSettings) -> None:
    """Make the folder, with the settings in it; one that is there must be of the same run."""
    record = what_decides(settings)
    if folder.hyperparameters.exists():
        if read_json(folder.hyperparameters) != record:
            raise InputError(
                f"--out {folder}: holds a run of other settings ({folder.hyperparameters.name} has them); "
                "give the same, or another folder"
            )
        return
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); give another folder") from error
    write_json(folder.hyperparameters, record)


def what_decides(settings: PretrainingSettings) -> dict[str, Any]:
    """The settings that the weights depend on."""
    of_the_machine = ("out", "device", "num_workers", "report_to")
    return {name: value for name, value in asdict(settings).items() if name not in of_the_machine}


def make_scenes(
    settings: PretrainingSettings, config: ModelConfig
) -> tuple[DescribedScenes, DescribedScenes]:
    """Scenes to train on and others to score; none is in a validation or test split of the built-in data."""
    scenes = draw_scenes(HELD_OUT + settings.scenes, settings.seed, held_out_scenes())
    described = partial(
        DescribedScenes,
        transform=make_transform("targetpad", config.image_size),
        image_size=config.image_size,
        seed=settings.seed,
    )
    return described(scenes[HELD_OUT:]), described(scenes[:HELD_OUT])


@torch.no_grad()
def score(stage: FirstStage, pairs: DescribedScenes, batch_size: int) -> dict[str, float]:
    """How well images and descriptions find each other among all ``pairs``, in percent.

    Returns:
        `text_to_image_at1` and `image_to_text_at1`, recall; `matching_accuracy`, over each pair and each text
        with the next pair's image.
    """
    model, device = stage.model, stage.device
    batches = list(DataLoader(pairs, batch_size))
    descriptions = [text for batch in batches for text in batch["text_input"]]
    own = torch.arange(len(descriptions))
    images, texts, right = [], [], []
    with eval_mode(stage):
        tokens = torch.cat([model.encode_image(batch["image"].to(device)) for batch in batches])
        for rows in own.split(batch_size):
            told_of = [descriptions[row] for row in rows.tolist()]
            images.append(model.target_features(tokens[rows]))
            texts.append(stage.text_features(told_of))
            text = model.tokenize(told_of)
            for chosen, answer in ((rows, 1), (own.roll(-1)[rows], 0)):
                keys = model.Qformer.bert.image_keys(tokens[chosen])
                right.append(stage.match(keys, text).argmax(dim=1).cpu() == answer)
    alike = similarity(torch.cat(texts), torch.cat(images)).cpu()
    return {
        "text_to_image_at1": percent(alike.argmax(dim=1) == own),
        "image_to_text_at1": percent(alike.argmax(dim=0) == own),
        "matching_accuracy": percent(torch.cat(right)),
    }


def percent(right: Tensor) -> float:
    """The share of True."""
    return 100 * right.double().mean().item()


def told(scores: dict[str, float]) -> str:
    """One line for the user."""
    return "  ".join(f"{name} {value:.1f}" for name, value in scores.items())


def finish(stage: FirstStage, held_out: DescribedScenes, settings: PretrainingSettings) -> Path:
    """Write the weights, load them as training will, score them, and say what the backbone's YAML needs."""
    path = Path(settings.out, f"{BACKBONE}.safetensors")
    digest = write_weights(path, stage.model, settings)
    model = untrained_model()
    load_backbone(model, {"blip2": str(path.resolve()), "sha256": digest})
    scores = score(FirstStage(model), held_out, settings.batch_size)
    print(f"{path}: {told(scores)}\nsha256: {digest}", flush=True)
    return path


def write_weights(path: Path, model: Blip2QformerCirAlignPrompt, settings: PretrainingSettings) -> str:
    """Write a backbone's safetensors file in float16; returns its SHA-256.

    Its header holds the settings. What SPRC adds to BLIP-2's model is left out.
    """
    from safetensors.torch import save

    state = {
        name: value.detach().cpu().half().clone()  # the language head is tied to the words, in one tensor
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not name.startswith(NEW_PARAMETERS)
    }
    contents = save(state, {"made_by": json.dumps(what_decides(settings))})
    write_atomically(path, lambda file: file.write(contents))
    return hashlib.sha256(contents).hexdigest()
