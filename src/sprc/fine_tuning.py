"""From the command line of ``blip_fine_tune_2.py`` to a trained model: data, model, run folder, loop."""

import argparse
from pathlib import Path

import torch

from sprc.checkpoint import save_checkpoint
from sprc.data.captions import process_caption
from sprc.data.cirr import load_cirr
from sprc.data.datasets import TripletDataset, check_images
from sprc.data.transforms import make_transform
from sprc.models.factory import choose_device, create_model, model_class, place
from sprc.run_folder import create_run_folder, write_json
from sprc.training import TrainingConfig, train
from sprc.validation import encode_split, validate

# Flags that set a field of ModelConfig; None leaves the backbone's value.
MODEL_SWITCHES = (
    "image_size",
    "use_gated_fusion",
    "fusion_strategy",
    "alpha_init",
    "fusion_dropout",
    "pool",
    "fusion_start",
)


def fine_tune(arguments: argparse.Namespace) -> Path:
    """Train on CIRR, write the run folder and return it.

    Everything that the user can have got wrong is looked at before the first step; see
    :class:`InputError`.
    """
    config = TrainingConfig(
        dataset="CIRR",
        num_epochs=arguments.num_epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        loss_weights={
            "loss_itm": arguments.loss_itm,
            "loss_rtc": arguments.loss_rtc,
            "loss_align": arguments.loss_align,
        },
        validation_frequency=arguments.validation_frequency,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
    )
    device = choose_device(arguments.device)
    train_split = load_cirr(arguments.data_path, "train")
    val_split = load_cirr(arguments.data_path, "val")
    config.check_fits(len(train_split.triplets))

    torch.manual_seed(config.seed)
    switches = {name: getattr(arguments, name) for name in MODEL_SWITCHES}
    model = create_model(
        model_class(arguments.blip_model_name),
        arguments.backbone,
        captions=[process_caption(triplet.caption) for triplet in train_split.triplets],
        **{name: value for name, value in switches.items() if value is not None},
    )
    transform = make_transform(arguments.transform, model.config.image_size, arguments.target_ratio)
    needed = {name for t in train_split.triplets for name in (t.reference, t.target)}
    check_images(train_split.image_paths, needed)
    check_images(val_split.image_paths, val_split.image_paths)
    place(model, device)

    run_folder = create_run_folder(arguments.models_path, config.dataset, arguments.blip_model_name)
    print(f"run folder: {run_folder}")
    hyperparameters = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
    }
    hyperparameters |= {name: getattr(model.config, name) for name in MODEL_SWITCHES}
    hyperparameters |= {"dataset": config.dataset, "device": str(device), "torch": str(torch.__version__)}
    write_json(run_folder / "training_hyperparameters.json", hyperparameters)

    def score() -> dict[str, float]:
        encoded = encode_split(
            model,
            val_split,
            transform,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            save_memory=arguments.save_memory,
        )
        return validate(encoded)

    best = float("-inf")

    def keep(epoch: int, metrics: dict[str, float]) -> None:
        nonlocal best
        better = metrics["arithmetic_mean"] > best
        best = max(best, metrics["arithmetic_mean"])
        print(
            f"epoch {epoch}: R@1 {metrics['recall_at1']:.2f}, R@5 {metrics['recall_at5']:.2f}, "
            f"R_s@1 {metrics['group_recall_at1']:.2f}, arithmetic mean {metrics['arithmetic_mean']:.2f}"
            + (" (best so far)" if better else "")
        )
        if arguments.save_training and (better or not arguments.save_best):
            name = "tuned_clip_arithmetic" if arguments.save_best else f"tuned_clip_{epoch}"
            save_checkpoint(run_folder / "saved_models" / f"{name}.pt", model, epoch, hyperparameters)

    dataset = TripletDataset(train_split.triplets, train_split.image_paths, transform)
    train(model, dataset, config, run_folder, score, keep)
    return run_folder
