"""From the settings of ``blip_fine_tune_2.py`` to a trained model: data, model, run folder, loop."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from sprc.config import MODEL_SWITCHES, ModelConfig, read_backbone
from sprc.data.datasets import per_epoch
from sprc.data.images import Loader
from sprc.data.missing import names_left_out
from sprc.distributed import from_main, world_size
from sprc.errors import InputError, Interrupted
from sprc.files import write_csv, write_json
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.models.checkpoint import save_checkpoint
from sprc.models.device import (
    SCORING_HELPS,
    default_workers,
    memory_explained,
    place,
    rest_vit,
    start_device,
    training_helps,
)
from sprc.models.factory import model_class
from sprc.models.gated_fusion import fusion_class
from sprc.models.switches import vocabulary_digest
from sprc.run_folder import RunFolder
from sprc.scoring.benchmarks import TrainingBenchmark, training_benchmark
from sprc.scoring.feature_cache import open_images
from sprc.scoring.ranking import Ranking
from sprc.training.compilation import require_compiler, told_compile_errors
from sprc.training.fusion_log import FusionLog
from sprc.training.loop import EpochItems, Trainer
from sprc.training.optimisation import TrainingConfig
from sprc.training.reranking import Reranking
from sprc.training.resume import (
    OF_THE_MACHINE,
    absolute_paths,
    check_left_out,
    check_same,
    command_of,
    digest_of_data,
    digest_of_file,
    resumed_flags,
)
from sprc.training.retrieval import Retrieval
from sprc.training.settings import LoopSettings, TrainingSettings
from sprc.training.start import (
    FUSION_IS_OFF,
    FUSION_PARAMETERS,
    Start,
    refuse_fusion_flags,
    require_first_stage,
    start,
)
from sprc.training.trackers import Trackers, require_trackers
from sprc.training.triplets import TrainingTriplets, loss_weights, read_triplets


@dataclass(frozen=True)
class Resumed:
    """What ``--resume`` goes on with."""

    flags: dict[str, Any]  # what the run's file says, and over it the command line
    differing: list[str]  # in words, the flags that are not the run's own

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.flags["resume"])


@dataclass(frozen=True)
class Data:
    """What is trained on and what is scored."""

    benchmark: TrainingBenchmark
    trained: TrainingTriplets
    left_out: dict[str, dict[str, Any]]  # by split, what --missing-images skip leaves out


class Task(Protocol):
    """What a kind of model is trained on, and how it is scored."""

    items: EpochItems
    objective: nn.Module | None  # what gives the losses in the model's place

    def before_epoch(self, epoch: int, step: int, on_batch: Callable[[], None]) -> None:
        """Make what an epoch needs; ``on_batch`` is called after each batch of images."""

    def rankings(self, on_batch: Callable[[], None]) -> list[Callable[[], Ranking]]:
        """What ranks each validation split by the model as it is; all ranks join, and the main one ranks."""


@dataclass(frozen=True)
class Run:
    """All that is ready before the first step."""

    settings: TrainingSettings
    folder: RunFolder
    data: Data
    model: Blip2Qformer
    task: Task
    trainer: Trainer
    hyperparameters: dict[str, Any]  # as the run's file has them


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
    settings, resumed = read_settings(defaults, given)
    require_trackers(settings.trackers)
    device = start_device(settings.device, settings.amp)
    settings = complete(settings, device)
    data, config = read_data(settings, device, resumed)
    begin = start(settings, config, None if resumed is None else resumed.flags.get("model_config"))
    model = begin.model
    digests = compare_digests(settings, data, model, resumed)
    for one in filter(None, begin):
        place(one, device)
    load = open_loader(settings, data, config, model)
    folder = make_folder(settings, data, resumed)
    hyperparameters = {**describe_run(settings, data, model), **begin.told(settings), "digests": digests}
    hyperparameters["command"] = command_of(given) if resumed is None else resumed.flags.get("command")
    task = make_task(settings, data, begin, load, folder)
    del begin  # a first stage is not needed any more
    trainer = make_trainer(settings, config, model, task, folder)
    if resumed is not None:
        go_on(trainer)
    written = {**hyperparameters, "model_config": asdict(model.config)}
    write_json(folder.hyperparameters, written)
    with Trackers.start(settings.trackers, folder, written) as trainer.trackers:
        log_fusion(settings, trainer)
        train(Run(settings, folder, data, model, task, trainer, hyperparameters))
    return folder.path


def check_flags(defaults: dict[str, Any], given: dict[str, Any], *, starts: bool = False) -> None:
    """Raise :class:`InputError` for flags that no run can start with; neither data nor weights are read.

    ``starts``: there will be a ``--model-path``, which is not known yet.
    """
    settings, _ = read_settings(defaults, given)
    if not starts:
        require_first_stage(settings)
    model_class(settings.blip_model_name)
    own = read_backbone(settings.backbone)["model"]
    ModelConfig.from_dict({**own, **settings.switches}, f"backbone {settings.backbone}")
    training_config(complete(settings, torch.device("cpu")), training_benchmark(settings.dataset))
    if settings.model_path is not None and not settings.model_path.is_file():
        raise InputError(f"--model-path {settings.model_path} is missing; give a checkpoint (.pt)")
    if settings.extra_triplets is not None and not settings.extra_triplets.is_file():
        raise InputError(f"--extra-triplets {settings.extra_triplets} is missing; give a JSON file")
    if settings.switches.get("use_gated_fusion") is False:
        refuse_fusion_flags(settings, FUSION_IS_OFF)


def read_settings(defaults: dict[str, Any], given: dict[str, Any]) -> tuple[TrainingSettings, Resumed | None]:
    """The settings of the run, for ``--resume`` those that it was started with."""
    resumed = None
    if given.get("resume") is None:
        flags = absolute_paths({**defaults, **given})
    else:
        flags, differing = resumed_flags(defaults, given)
        resumed = Resumed(flags, differing)
    settings = TrainingSettings.of_flags(flags)
    if resumed is None:
        settings.check_reranker()
    settings.check_triplets()
    settings.check_trackers()
    settings.check()
    if settings.contrast == "complementary" and "bank" in settings.kinds:
        raise InputError(
            f"--contrast complementary is over the batch, and --negatives {settings.negatives} has InfoNCE "
            "over a bank; leave one of the flags out"
        )
    if settings.log_fusion_every < 0:
        raise InputError(f"--log-fusion-every {settings.log_fusion_every} is too small; 0 logs nothing")
    if settings.train == "call2":
        refuse_fusion_flags(settings, "the fusion does not learn with --train call2; leave one out")
    if not 0 < settings.train_share <= 1:
        raise InputError(f"--train-share {settings.train_share} must be more than 0 and at most 1")
    if strategy := settings.switches.get("fusion_strategy"):
        fusion_class(strategy)  # an unknown one is refused before anything is read
    return settings, resumed


def complete(settings: TrainingSettings, device: torch.device) -> TrainingSettings:
    """The settings with what the benchmark and the machine give where the user gives nothing."""
    weights = training_benchmark(settings.dataset).loss_weights
    found: dict[str, Any] = {k: v for k, v in weights.items() if getattr(settings, k) is None}
    found |= settings.weights_where_unset() | settings.reranker_where_unset()
    if settings.num_workers is None:
        found["num_workers"] = default_workers(device)
    found |= settings.where_unset()
    return replace(settings, **found)


def read_data(
    settings: TrainingSettings, device: torch.device, resumed: Resumed | None
) -> tuple[Data, TrainingConfig]:
    """The annotations, read and checked, and the loop's configuration, which has to fit them."""
    missing = settings.missing_images
    kind = training_benchmark(settings.dataset)
    benchmark = kind.load(settings.data_path, kind.protocol_of(settings), missing_images=missing)
    config = training_config(settings, benchmark)
    if settings.compile:
        require_compiler(device)
    train_splits = benchmark.train_splits(settings.data_path, missing_images=missing)
    trained = read_triplets(settings, train_splits)
    left_out = names_left_out([*train_splits, *benchmark.splits])
    if resumed is not None and missing == "skip":
        check_left_out(resumed.folder.missing_images, left_out)
    config.check_fits(len(trained.own) + per_epoch(len(trained.extra), settings.extra_weight))
    return Data(benchmark, trained, left_out), config


def compare_digests(
    settings: TrainingSettings, data: Data, model: Blip2Qformer, resumed: Resumed | None
) -> dict[str, str | None]:
    """Digests of what the run starts from and of its data; a resumed run's have to be what they were."""
    digests = {
        "data_path": digest_of_data(data.benchmark.splits, data.trained.own),
        "model_path": digest_of_file(settings.model_path),
        "extra_triplets": digest_of_file(settings.extra_triplets),
        "vocab": vocabulary_digest(model.tokenizer),
    }
    if resumed is not None:
        check_same(resumed.flags.get("digests", {}), digests, resumed.flags)
        if resumed.differing:
            print(f"resuming with {', '.join(resumed.differing)}", flush=True)
    return digests


def open_loader(
    settings: TrainingSettings, data: Data, config: TrainingConfig, model: Blip2Qformer
) -> Loader:
    """What reads the images of training and validation: pixels, or tokens from the feature cache."""
    at_once = settings.reading["batch_size"]
    images = 2 + (settings.negatives_per_query or 0)  # of a triplet
    if settings.reranks:
        images = 1 + cast(int, settings.rerank_negatives)
    load = open_images(
        model,
        {"transform": settings.transform, "target_ratio": settings.target_ratio},
        [*data.trained.paths.values(), *data.benchmark.image_paths()],
        feature_cache=settings.feature_cache,
        cache_dtype=settings.cache_dtype,
        batch_size=at_once,
        num_workers=settings.reading["num_workers"],
        read_at_once=max(images * config.batch_size // world_size(), at_once),
    )
    if settings.feature_cache is not None:
        rest_vit(model)
    return load


def make_folder(settings: TrainingSettings, data: Data, resumed: Resumed | None) -> RunFolder:
    """A new folder, which is told of at once; or that of the run that goes on."""
    if resumed is not None:
        return resumed.folder
    short_name, name = data.benchmark.short_name, settings.blip_model_name
    folder = from_main(lambda: RunFolder.create(settings.models_path, short_name, name))
    print(f"run folder: {folder}", flush=True)
    if settings.missing_images == "skip":
        write_json(folder.missing_images, data.left_out)
    if data.trained.changes:
        write_csv(folder.noisy_triplets, data.trained.changes)
    return folder


def make_task(settings: TrainingSettings, data: Data, begin: Start, load: Loader, folder: RunFolder) -> Task:
    """What the model is trained on and scored by. The first stage of a re-ranker is read here for good."""
    model, trained, scored = begin.model, data.trained, data.benchmark.splits
    if begin.first_stage is not None:
        reranker = cast(Blip2QformerCirRerank, model)
        with memory_explained(model.device, settings.reading["batch_size"], SCORING_HELPS):
            return Reranking(settings, begin.first_stage, reranker, trained, scored, load)
    return Retrieval(settings, cast(Blip2QformerCirAlignPrompt, model), trained, scored, load, folder)


def make_trainer(
    settings: TrainingSettings,
    config: TrainingConfig,
    model: Blip2Qformer,
    task: Task,
    folder: RunFolder,
) -> Trainer:
    """The loop around the model, which it may have compiled."""
    if settings.compile:
        method = getattr(model, model.compiled)
        setattr(model, model.compiled, torch.compile(method, dynamic=True))
    trainer = Trainer(model, task.items, config, folder, objective=task.objective)

    def before_epoch(epoch: int, step: int) -> None:
        task.before_epoch(epoch, step, trainer.stop_if_asked)

    trainer.before_epoch = before_epoch
    return trainer


def log_fusion(settings: TrainingSettings, trainer: Trainer) -> None:
    """Have the loop write what the fusion does, if there is one and the user wants it."""
    progress, module = trainer.progress, getattr(trainer.model, "gated_fusion", None)
    if module is None or not any(one.requires_grad for one in module.parameters()):
        return
    if settings.log_fusion_every:
        step = progress.epoch * trainer.steps_per_epoch + progress.step
        log = FusionLog(
            module,
            trainer.run_folder,
            settings.log_fusion_every,
            step,
            trainer.trackers,
            compiled=settings.compile,
        )
        trainer.after_backward = log.after_backward


def train(run: Run) -> None:
    """Run the loop, with the benchmark's validation, keeping the checkpoints that the user wants."""
    config, settings = run.trainer.config, run.settings
    helps = training_helps(
        config.grad_cache,
        has_cache=settings.feature_cache is not None,
        frozen_vit=run.model.config.freeze_vit,
    )

    def validate(stop_if_asked: Callable[[], None]) -> dict[str, float | str]:
        return score(run, stop_if_asked)

    def keep_if_wanted(epoch: int, metrics: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
        keep(run, epoch, metrics, earlier)

    try:
        with memory_explained(run.model.device, config.batch_size, helps), told_compile_errors():
            run.trainer.train(validate, keep_if_wanted)
    except Interrupted as stop:
        launcher = "python" if world_size() == 1 else "torchrun ..."
        with suppress(OSError):  # the terminal may be gone, which SIGHUP tells of
            print(
                f"stopped by {stop}; go on with: {launcher} src/blip_fine_tune_2.py --resume {run.folder}",
                flush=True,
            )
        raise


def score(run: Run, stop_if_asked: Callable[[], None]) -> dict[str, float | str]:
    """The metrics of the model as it is, on the benchmark's validation split."""
    rankings = run.task.rankings(stop_if_asked)
    return from_main(lambda: run.data.benchmark.metrics([ranked() for ranked in rankings]))


def keep(run: Run, epoch: int, metrics: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """Say what an epoch's metrics are, and save the model if the user wants it."""
    benchmark, settings = run.data.benchmark, run.settings
    better = all(metrics[benchmark.criterion] > row[benchmark.criterion] for row in earlier)
    print(f"epoch {epoch}: {benchmark.summary(metrics)}{' (best so far)' if better else ''}", flush=True)
    if settings.save_training and (better or not settings.save_best):
        name = benchmark.checkpoint if settings.save_best else f"tuned_clip_{epoch}"
        told = {name: value for name, value in run.hyperparameters.items() if name not in OF_THE_MACHINE}
        save_checkpoint(run.folder.checkpoint(name), run.model, epoch, told, full=settings.save_full)


def training_config(
    settings: TrainingSettings, benchmark: TrainingBenchmark | type[TrainingBenchmark]
) -> TrainingConfig:
    """The settings that the loop needs; :class:`InputError` names one that cannot work."""
    span = benchmark.schedule_span(settings.num_epochs)
    return TrainingConfig(
        **{one.name: getattr(settings, one.name) for one in fields(LoopSettings)},
        schedule_epochs=span,
        warm_up=benchmark.warm_up(span),
        start_divisor=benchmark.start_divisor,
        loss_weights=loss_weights(settings),
        other_rates=other_rates(settings),
        alone_epochs=settings.warmup_fusion,
        alone_prefix=FUSION_PARAMETERS,
    )


def other_rates(settings: TrainingSettings) -> dict[str, float]:
    """The rates of ``--lr-group`` and ``--fusion-lr``, by the beginning of the parameters' names."""
    rates: dict[str, float] = {}
    for word in settings.lr_group:
        prefix, _, rate = word.rpartition("=")
        try:
            value = float(rate)
        except ValueError:
            value = math.nan
        if not prefix or not 0 < value < math.inf:
            raise InputError(f"--lr-group {word!r}: give PREFIX=RATE, such as {FUSION_PARAMETERS}=1e-4")
        if prefix in rates:
            raise InputError(f"--lr-group {word!r}: {prefix}* has a rate already; give one")
        rates[prefix] = value
    if settings.fusion_lr is not None:
        if FUSION_PARAMETERS in rates:
            raise InputError(
                f"--fusion-lr {settings.fusion_lr} and --lr-group {FUSION_PARAMETERS}= are two rates for the "
                "same parameters; give one"
            )
        rates[FUSION_PARAMETERS] = settings.fusion_lr
    return rates


def describe_run(settings: TrainingSettings, data: Data, model: Blip2Qformer) -> dict[str, Any]:
    """The hyperparameters, as JSON holds them: all flags, and on what the run runs now."""
    flags = {name: value for name, value in vars(settings).items() if name not in ("resume", "switches")}
    flags |= {name: getattr(model.config, name) for name in MODEL_SWITCHES}
    flags |= {"device": str(model.device), "ranks": world_size(), "torch": str(torch.__version__)}
    if settings.missing_images == "skip":
        flags["left_out"] = {
            title: {"images": len(found["images"]), "triplets": found["triplets"]}
            for title, found in data.left_out.items()
        }
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}


def go_on(trainer: Trainer) -> None:
    """Load the run's state, and say from where it goes on."""
    note = trainer.load_state()
    progress, last = trainer.progress, trainer.config.num_epochs
    print(f"resuming {trainer.run_folder} at epoch {progress.epoch}, step {progress.step}{note}", flush=True)
    if progress.epoch >= last:
        print(f"all of its {last} epochs are done; --num-epochs with more goes on", flush=True)
