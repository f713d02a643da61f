"""From the command line of ``blip_fine_tune_2.py`` to a trained model: data, model, run folder, loop."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sprc.benchmark import Benchmark
from sprc.checkpoint import load_checkpoint, save_checkpoint
from sprc.compilation import require_compiler, told_compile_errors
from sprc.config import ModelConfig, switches_from_environment
from sprc.data.captions import process_caption
from sprc.data.datasets import TripletDataset
from sprc.distributed import from_main, rank, world_size
from sprc.errors import InputError, Interrupted
from sprc.feature_cache import open_images
from sprc.fusion_log import FusionLog
from sprc.models.factory import choose_device, create_model, model_class, place
from sprc.run_folder import create_run_folder, write_json
from sprc.training import Trainer, TrainingConfig
from sprc.validation import LARGEST_BATCH, encode_split, rank_split

HYPERPARAMETERS = "training_hyperparameters.json"

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

# The published weights of the losses; FashionIQ's is the unweighted sum.
LOSS_WEIGHTS = {
    "cirr": {"loss_rtc": 0.4, "loss_align": 0.4},
    "fashioniq": {"loss_rtc": 1.0, "loss_align": 1.0},
}


def fine_tune(arguments: argparse.Namespace) -> Path:
    """Train, write the run folder and return it; or go on with the run of ``arguments.resume``.

    Everything that the user can have got wrong is looked at before the first step; see
    :class:`InputError`. Raises :class:`Interrupted` after SIGINT or SIGTERM, with the state saved.
    """
    resume: Path | None = arguments.resume
    if resume is not None:
        arguments = resumed_arguments(arguments)
    if arguments.log_fusion_every < 0:
        raise InputError(f"--log-fusion-every {arguments.log_fusion_every} is too small; 0 logs nothing")
    writer = tensorboard_writer() if arguments.tensorboard else None  # on all ranks, so that all complain
    for name, weight in LOSS_WEIGHTS[arguments.dataset].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, weight)
    benchmark = Benchmark.load(arguments.dataset, arguments.data_path, arguments.fiq_protocol)
    config = TrainingConfig(
        dataset=benchmark.name,
        num_epochs=arguments.num_epochs,
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
    device = choose_device(arguments.device)
    if arguments.compile:
        require_compiler(device)
    triplets, paths = benchmark.train_triplets(arguments.data_path)
    config.check_fits(len(triplets))

    torch.manual_seed(config.seed)
    model = start_model(arguments, [text for t in triplets for text in (t.training_captions or (t.caption,))])
    if arguments.fusion_lr is not None and model.gated_fusion is None:
        raise InputError(f"--fusion-lr {arguments.fusion_lr}: fusion is off; leave the flag out")
    place(model, device)
    # Fields that an earlier version did not know were at their defaults.
    defaults = asdict(ModelConfig())
    started_with = defaults | getattr(arguments, "model_config", asdict(model.config))
    if changed := [k for k, v in asdict(model.config).items() if started_with[k] != v]:
        raise InputError(
            f"{resume} was started with another {', '.join(changed)} than {arguments.backbone}.yaml "
            "gives now; put the file back as it was, or start a new run"
        )
    load = open_images(
        model,
        {name: getattr(arguments, name) for name in ("transform", "target_ratio")},
        [*paths.values(), *benchmark.image_paths()],
        feature_cache=arguments.feature_cache,
        cache_dtype=arguments.cache_dtype,
        batch_size=min(config.batch_size, LARGEST_BATCH),
        num_workers=config.num_workers,
    )
    if resume is None:
        name = arguments.blip_model_name
        run_folder = from_main(lambda: create_run_folder(arguments.models_path, benchmark.name, name))
        print(f"run folder: {run_folder}", flush=True)
    else:
        run_folder = resume
    hyperparameters = {
        key: value for key, value in vars(arguments).items() if key not in ("resume", "model_config")
    }
    hyperparameters |= {name: getattr(model.config, name) for name in MODEL_SWITCHES}
    hyperparameters |= {"device": str(device), "ranks": world_size(), "torch": str(torch.__version__)}
    hyperparameters = {k: str(v) if isinstance(v, Path) else v for k, v in hyperparameters.items()}
    if resume is None:
        write_json(run_folder / HYPERPARAMETERS, {**hyperparameters, "model_config": asdict(model.config)})

    def score() -> dict[str, float | str]:
        batch_size = min(config.batch_size, LARGEST_BATCH)
        encoding = {"batch_size": batch_size, "num_workers": config.num_workers}
        encoding |= {"save_memory": arguments.save_memory, "gallery_dtype": arguments.gallery_dtype}
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

    if arguments.compile:
        # The method and not the model, so that parameters keep their names.
        model.embed_tokens = torch.compile(model.embed_tokens, dynamic=True)
    scalars = writer(run_folder / "tensorboard") if arguments.tensorboard and rank() == 0 else None
    training_set = TripletDataset(triplets, paths, load, config.seed)
    trainer = Trainer(model, training_set, config, run_folder, scalars=scalars)
    if resume is not None:
        note = trainer.load_state()
        progress = trainer.progress
        print(f"resuming {run_folder} at epoch {progress.epoch}, step {progress.step}{note}", flush=True)
    if model.gated_fusion is not None and arguments.log_fusion_every:
        step = trainer.progress.epoch * trainer.steps_per_epoch + trainer.progress.step
        log = FusionLog(model.gated_fusion, run_folder, arguments.log_fusion_every, step, scalars)
        trainer.after_backward = log.after_backward
    try:
        with told_compile_errors():
            trainer.train(score, keep)
    except Interrupted as stop:
        launcher = "python" if world_size() == 1 else "torchrun ..."
        print(
            f"stopped by {stop}; go on with: {launcher} src/blip_fine_tune_2.py --resume {run_folder}",
            flush=True,
        )
        raise
    return run_folder


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


def resumed_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    """The flags that the run to resume was started with; ``--device`` may be given anew."""
    path = arguments.resume / HYPERPARAMETERS
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        for name in ("data_path", "models_path", "model_path", "feature_cache", "vocab"):
            written[name] = None if written.get(name) is None else Path(written[name])
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give --resume the folder of a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is broken; restore it from a copy") from error
    device = arguments.device or written["device"]
    if arguments.device is None and world_size() > 1:
        device = device.split(":")[0]  # each rank has its own GPU
    # A run of an earlier version did not know all flags: those are at their defaults.
    return argparse.Namespace(**{**vars(arguments), **written, "device": device, "resume": arguments.resume})
