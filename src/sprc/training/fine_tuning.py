"""From the command line of ``blip_fine_tune_2.py`` to a trained model: data, model, run folder, loop."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sprc.config import ModelConfig, switches_from_environment
from sprc.data.captions import process_caption
from sprc.data.datasets import TripletDataset
from sprc.data.missing import names_left_out
from sprc.data.split import triplets_of
from sprc.distributed import from_main, rank, world_size
from sprc.errors import InputError, Interrupted
from sprc.files import write_json
from sprc.models.checkpoint import load_checkpoint, save_checkpoint
from sprc.models.device import (
    default_workers,
    memory_explained,
    place,
    rest_vit,
    start_device,
    training_helps,
)
from sprc.models.factory import create_model, model_class
from sprc.models.switches import vocabulary_digest
from sprc.run_folder import create_run_folder
from sprc.scoring.benchmarks import Benchmark, benchmark_class
from sprc.scoring.encoding import LARGEST_BATCH, encode_split
from sprc.scoring.feature_cache import open_images
from sprc.scoring.recall import rank_split
from sprc.training.compilation import require_compiler, told_compile_errors
from sprc.training.fusion_log import FusionLog
from sprc.training.loop import Trainer, TrainingConfig
from sprc.training.resume import (
    HYPERPARAMETERS,
    MISSING_IMAGES,
    absolute_paths,
    check_left_out,
    check_same,
    digest_of_data,
    digest_of_file,
    resumed_flags,
)

# Flags that set a field of ModelConfig; None leaves the backbone's value.
MODEL_SWITCHES = (
    "image_size",
    "freeze_vit",
    "use_gated_fusion",
    "fusion_strategy",
    "alpha_init",
    "fusion_dropout",
    "pool",
    "fusion_start",
    "fusion_text",
)


def fine_tune(defaults: dict[str, Any], given: dict[str, Any]) -> Path:
    """Train, write the run folder and return it; or go on with the run of ``--resume``.

    Everything that the user can have got wrong is looked at before the first step.

    Args:
        defaults: of all flags of ``blip_fine_tune_2.py``.
        given: the flags that were given.

    Raises:
        InputError: a flag, a file or an entry of one is wrong.
        Interrupted: a signal asked the run to stop; its state is saved.
    """
    differing: list[str] = []
    if given.get("resume") is None:
        flags = absolute_paths({**defaults, **given})
    else:
        flags, differing = resumed_flags(defaults, given)
    arguments = argparse.Namespace(**flags)
    resume: Path | None = arguments.resume
    if arguments.log_fusion_every < 0:
        raise InputError(f"--log-fusion-every {arguments.log_fusion_every} is too small; 0 logs nothing")
    writer = tensorboard_writer() if arguments.tensorboard else None  # on all ranks, so that all complain
    for name, weight in benchmark_class(arguments.dataset).loss_weights.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, weight)
    device = start_device(arguments.device, arguments.amp)
    if arguments.num_workers is None:
        arguments.num_workers = default_workers(device)
    missing_images = arguments.missing_images
    benchmark = benchmark_class(arguments.dataset).load(
        arguments.data_path, arguments.fiq_protocol, missing_images=missing_images
    )
    config = training_config(arguments, benchmark)
    if arguments.compile:
        require_compiler(device)
    train_splits = benchmark.train_splits(arguments.data_path, missing_images=missing_images)
    triplets, paths = triplets_of(train_splits)
    left_out = names_left_out([*train_splits, *benchmark.splits])
    if resume is not None and missing_images == "skip":
        check_left_out(resume / MISSING_IMAGES, left_out)
    config.check_fits(len(triplets))

    torch.manual_seed(config.seed)
    model = start_model(arguments, [text for t in triplets for text in (t.training_captions or (t.caption,))])
    if arguments.fusion_lr is not None and model.gated_fusion is None:
        raise InputError(f"--fusion-lr {arguments.fusion_lr}: fusion is off; leave the flag out")
    digests = {
        "data_path": digest_of_data(benchmark.splits, triplets),
        "model_path": digest_of_file(arguments.model_path),
        "vocab": vocabulary_digest(model.tokenizer),
    }
    if resume is not None:
        check_same(flags.get("digests", {}), digests, flags)
        check_same_model(arguments, model)
        if differing:
            print(f"resuming with {', '.join(differing)}", flush=True)
    place(model, device)
    load = open_images(
        model,
        {name: getattr(arguments, name) for name in ("transform", "target_ratio")},
        [*paths.values(), *benchmark.image_paths()],
        feature_cache=arguments.feature_cache,
        cache_dtype=arguments.cache_dtype,
        batch_size=min(config.batch_size, LARGEST_BATCH),
        num_workers=config.num_workers,
        read_at_once=max(2 * config.batch_size // world_size(), min(config.batch_size, LARGEST_BATCH)),
    )
    if arguments.feature_cache is not None:
        rest_vit(model)
    if resume is None:
        name = arguments.blip_model_name
        run_folder = from_main(lambda: create_run_folder(arguments.models_path, benchmark.short_name, name))
        print(f"run folder: {run_folder}", flush=True)
    else:
        run_folder = resume
    hyperparameters = {**describe_run(arguments, model), "digests": digests}
    if missing_images == "skip":
        hyperparameters["left_out"] = {
            title: {"images": len(found["images"]), "triplets": found["triplets"]}
            for title, found in left_out.items()
        }
        if resume is None:
            write_json(run_folder / MISSING_IMAGES, left_out)
    if arguments.compile:
        # The method and not the model, so that parameters keep their names.
        model.embed_tokens = torch.compile(model.embed_tokens, dynamic=True)
    scalars = writer(run_folder / "tensorboard") if arguments.tensorboard and rank() == 0 else None
    training_set = TripletDataset(triplets, paths, load, config.seed)
    trainer = Trainer(model, training_set, config, run_folder, scalars=scalars)
    if resume is not None:
        go_on(trainer)
    write_json(run_folder / HYPERPARAMETERS, {**hyperparameters, "model_config": asdict(model.config)})
    if model.gated_fusion is not None and arguments.log_fusion_every:
        step = trainer.progress.epoch * trainer.steps_per_epoch + trainer.progress.step
        log = FusionLog(model.gated_fusion, run_folder, arguments.log_fusion_every, step, scalars)
        trainer.after_backward = log.after_backward

    def score(stop_if_asked: Callable[[], None]) -> dict[str, float | str]:
        names = ("num_workers", "save_memory", "gallery_dtype")
        encoding = {name: getattr(arguments, name) for name in names}
        encoding |= {"batch_size": min(config.batch_size, LARGEST_BATCH), "on_batch": stop_if_asked}
        encoded = [encode_split(model, split, load, **encoding) for split in benchmark.splits]
        pairs = list(zip(benchmark.splits, encoded, strict=True))
        return from_main(lambda: benchmark.metrics([rank_split(*pair) for pair in pairs]))

    def keep(epoch: int, metrics: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
        better = all(metrics[benchmark.criterion] > row[benchmark.criterion] for row in earlier)
        print(f"epoch {epoch}: {benchmark.summary(metrics)}{' (best so far)' if better else ''}", flush=True)
        if arguments.save_training and (better or not arguments.save_best):
            name = benchmark.checkpoint if arguments.save_best else f"tuned_clip_{epoch}"
            path = run_folder / "saved_models" / f"{name}.pt"
            save_checkpoint(path, model, epoch, hyperparameters, full=arguments.save_full)

    helps = training_helps(
        config.grad_cache,
        has_cache=arguments.feature_cache is not None,
        frozen_vit=model.config.freeze_vit,
    )
    try:
        with memory_explained(device, config.batch_size, helps), told_compile_errors():
            trainer.train(score, keep)
    except Interrupted as stop:
        launcher = "python" if world_size() == 1 else "torchrun ..."
        with suppress(OSError):  # the terminal may be gone, which SIGHUP tells of
            print(
                f"stopped by {stop}; go on with: {launcher} src/blip_fine_tune_2.py --resume {run_folder}",
                flush=True,
            )
        raise
    return run_folder


def training_config(arguments: argparse.Namespace, benchmark: Benchmark) -> TrainingConfig:
    """The flags that the loop needs; :class:`InputError` names one that cannot work."""
    span = benchmark.schedule_span(arguments.num_epochs)
    return TrainingConfig(
        num_epochs=arguments.num_epochs,
        schedule_epochs=span,
        warm_up=benchmark.warm_up(span),
        start_divisor=benchmark.start_divisor,
        batch_size=arguments.batch_size,
        grad_cache=chunk_of(arguments),
        learning_rate=arguments.learning_rate,
        loss_weights={name: getattr(arguments, name) for name in ("loss_itm", "loss_rtc", "loss_align")},
        validation_frequency=arguments.validation_frequency,
        checkpoint_every=arguments.checkpoint_every,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
        amp=arguments.amp,
        other_rates={} if arguments.fusion_lr is None else {"gated_fusion.": arguments.fusion_lr},
    )


def describe_run(arguments: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """The hyperparameters, as JSON holds them: all flags, and on what the run runs now."""
    left_out = ("resume", "model_config", "digests")
    flags = {name: value for name, value in vars(arguments).items() if name not in left_out}
    flags |= {name: getattr(model.config, name) for name in MODEL_SWITCHES}
    flags |= {"device": str(model.device), "ranks": world_size(), "torch": str(torch.__version__)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}


def check_same_model(arguments: argparse.Namespace, model: torch.nn.Module) -> None:
    """Raise :class:`InputError` unless the model is as the run to resume was started with."""
    # Fields that an earlier version did not know were at their defaults.
    started_with = asdict(ModelConfig()) | getattr(arguments, "model_config", asdict(model.config))
    if changed := [k for k, v in asdict(model.config).items() if started_with[k] != v]:
        raise InputError(
            f"{arguments.resume} was started with another {', '.join(changed)} than "
            f"{arguments.backbone}.yaml gives now; put the file back as it was, or start a new run"
        )


def go_on(trainer: Trainer) -> None:
    """Load the run's state, and say from where it goes on."""
    note = trainer.load_state()
    progress, last = trainer.progress, trainer.config.num_epochs
    print(f"resuming {trainer.run_folder} at epoch {progress.epoch}, step {progress.step}{note}", flush=True)
    if progress.epoch >= last:
        print(f"all of its {last} epochs are done; --num-epochs with more goes on", flush=True)


def chunk_of(arguments: argparse.Namespace) -> int:
    """``--grad-cache``; 0 where it is not given, which on the command line is an error."""
    if arguments.grad_cache is None:
        return 0
    if arguments.grad_cache < 1:
        raise InputError(f"--grad-cache {arguments.grad_cache} is too small; the least is 1 (triplet)")
    return arguments.grad_cache


def tensorboard_writer() -> Callable[[Path], Any]:
    """TensorBoard's class of writers; :class:`InputError` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


def start_model(arguments: argparse.Namespace, captions: list[str]) -> torch.nn.Module:
    """The model to train: from its backbone's weights, or from the checkpoint of ``--model-path``."""
    flags = {name: getattr(arguments, name, None) for name in MODEL_SWITCHES}
    switches = {name: value for name, value in flags.items() if value is not None}
    switches = {"use_gated_fusion": True} | switches_from_environment() | switches  # the command line wins
    # A run keeps the depth that it was started with, whatever the backbone builds for a new one.
    recorded = getattr(arguments, "model_config", {})
    if "vit_depth" in recorded:
        switches["vit_depth"] = recorded["vit_depth"]
    if arguments.model_path is not None:
        checkpoint = load_checkpoint(
            arguments.model_path,
            model_name=arguments.blip_model_name,
            backbone=arguments.backbone,
            vocab=arguments.vocab,
            switches=switches,
        )
        print(checkpoint.found, flush=True)
        return checkpoint.model
    cls = model_class(arguments.blip_model_name)
    captions = [process_caption(caption) for caption in captions]
    return create_model(cls, arguments.backbone, captions=captions, vocab=arguments.vocab, **switches)
