"""Going on with a run: the flags that it was started with, and which of them may be given anew."""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sprc.data import DATASETS
from sprc.data.reading import quote, read_json
from sprc.data.split import Split, Triplet
from sprc.distributed import world_size
from sprc.errors import InputError
from sprc.files import absolute, file_digest
from sprc.models.model_path import named_model
from sprc.run_folder import RunFolder
from sprc.scoring.benchmarks import training_benchmark
from sprc.training.state import saved_progress

PATHS = ("data_path", "models_path", "model_path", "extra_triplets", "feature_cache", "vocab")
# Of the machine that trained and not of the model: a checkpoint, which travels, does not tell it.
OF_THE_MACHINE = (*PATHS, "num_workers", "command")

# What a run may be resumed with, because it cannot change what the run learns, or the user wants the change.
# Every other flag has to be the run's own.
MAY_DIFFER = frozenset(
    {
        "data_path",  # the same data at another place: digests are compared
        "model_path",  # the same file at another place, likewise
        "extra_triplets",  # likewise
        "vocab",  # the same words from another file, likewise
        "feature_cache",  # the same tokens; turned on or off where the stored type rounds nothing
        "num_epochs",  # while the schedule stays, and not fewer than are trained
        "grad_cache",  # the same gradients, in parts of another size
        "device",  # the user's choice; another device rounds otherwise
        "num_workers",  # who reads the images
        "save_memory",  # where the gallery lies in validation
        "timeout",  # how long ranks wait for each other
        "checkpoint_every",  # how much a kill can cost
        "tensorboard",  # who is told what goes to the CSV files
        "report_to",  # likewise
        "log_fusion_every",  # rows of fusion_metrics.csv
    }
)

# What every version has written, and its type. A flag that a run does not know yet is at its default.
WRITTEN: dict[str, Any] = {
    **dict.fromkeys(("dataset", "backbone", "blip_model_name", "data_path", "transform", "device"), str),
    **dict.fromkeys(("num_epochs", "batch_size", "validation_frequency", "num_workers", "seed"), int),
    **dict.fromkeys(("learning_rate", "loss_align", "loss_rtc", "loss_itm", "target_ratio"), (int, float)),
    **dict.fromkeys(("save_training", "save_best", "save_memory", "use_gated_fusion"), bool),
}


def absolute_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags, those of files and folders absolute: a run may go on from another working directory."""
    return {
        name: absolute(named_model(Path(value)) if name == "model_path" else Path(value))
        if name in PATHS and value is not None
        else value
        for name, value in flags.items()
    }


def read_run(run_folder: Path) -> dict[str, Any]:
    """What the run in ``run_folder`` was started with; :class:`InputError` if its file says no such thing."""
    path = RunFolder(run_folder).hyperparameters
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is missing; give --resume the folder of a run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken; restore it from a copy") from error
    if not isinstance(written, dict):
        raise InputError(f"{path} is broken: it holds no object; restore it from a copy")
    kinds = WRITTEN | {name: dict for name in ("model_config", "digests") if name in written}
    kinds |= {name: (str, type(None)) for name in PATHS if name in written}
    kinds |= {name: list for name in ("report_to",) if name in written}
    wrong = [name for name, kind in kinds.items() if not isinstance(written.get(name), kind)]
    if not wrong and written["dataset"].lower() not in DATASETS:
        wrong = ["dataset"]
    if wrong:
        raise InputError(f"{path} is broken: it has no usable {', '.join(wrong)}; restore it from a copy")
    return written


def own_timeout(run_folder: Path, default: int) -> int:
    """The run's own ``--timeout``. What is wrong with its file, the ranks say together, later."""
    try:
        timeout = read_run(run_folder).get("timeout", default)
    except InputError:
        return default
    return timeout if isinstance(timeout, int) else default


def resumed_flags(defaults: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The flags to go on with, and in words those that are not the run's own.

    Args:
        defaults: of all flags.
        given: those of the command line, `resume` among them.

    Raises:
        InputError: a flag that has to be the run's own differs from it.
    """
    run_folder = absolute(given["resume"])
    own = absolute_paths({**defaults, **read_run(run_folder)})
    own["models_path"] = run_folder.parent  # it may have been moved
    own["dataset"] = own["dataset"].lower()
    if world_size() > 1:
        own["device"] = own["device"].split(":")[0]  # each rank has its own GPU
    given = absolute_paths({name: value for name, value in given.items() if name != "resume"})
    differing = {name: value for name, value in given.items() if value != own[name]}
    flags = {**own, **given, "resume": run_folder}
    for name in differing:
        if not may_differ(name, own):
            hint = "; to hold less of a batch at once give --grad-cache" if name == "batch_size" else ""
            raise InputError(
                f"{flag(name, given[name])}: {run_folder} was started with {flag(name, own[name])}, which "
                f"cannot change within a run; leave the flag out, or start a new run{hint}"
            )
    if "feature_cache" in differing:
        check_cache(own, flags)
    if "num_epochs" in differing:
        check_epochs(own, flags)
    return flags, [f"{flag(name, value)} (was {own[name]})" for name, value in differing.items()]


def may_differ(name: str, own: dict[str, Any]) -> bool:
    """Whether the flag ``name`` may be given anew to a run with the flags ``own``."""
    if name == "cache_dtype":  # without a cache it had no effect
        return own["feature_cache"] is None
    if name in ("model_path", "extra_triplets"):  # an earlier version did not write what was in the file
        return own.get("digests", {}).get(name) is not None
    return name in MAY_DIFFER


def flag(name: str, value: object) -> str:
    """A flag as it is written on the command line."""
    dashed = f"--{name.replace('_', '-')}"
    if value is None or value is False or value == [] or value == ():
        return f"no {dashed}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return dashed if value is True else f"{dashed} {value}"


def command_of(given: dict[str, Any]) -> str:
    """The command that gives these flags, as a shell takes it; with several ranks torchrun's."""
    ranks, here = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    words = ["python"]
    if ranks > 1:
        words = ["torchrun", *(["--nnodes", str(ranks // here)] if ranks > here else [])]
        words += ["--nproc-per-node", str(here)]
    words.append("src/blip_fine_tune_2.py")
    for name, value in given.items():
        dashed = name.replace("_", "-")
        if value is None or isinstance(value, bool):
            words.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            several = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{dashed}", *map(str, several)]
    return shlex.join(words)


def check_cache(own: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raise :class:`InputError` if a cache is turned on or off whose values are rounded ones."""
    computed = "float16" if flags["device"].startswith("cuda") else "float32"
    turned = (own["feature_cache"] is None) != (flags["feature_cache"] is None)
    if turned and flags["cache_dtype"] not in (computed, "float32"):
        raise InputError(
            f"{flag('feature_cache', flags['feature_cache'])}: the run was started with "
            f"{flag('feature_cache', own['feature_cache'])}, and --cache-dtype {flags['cache_dtype']} rounds "
            f"what {flags['device']} computes, so the rest of it would be another; leave the flag out"
            f"{', or add --cache-dtype float32' if own['feature_cache'] is None else ''}"
        )


def check_epochs(own: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raise :class:`InputError` if ``--num-epochs`` would change the schedule, or was passed already."""
    before, now = own["num_epochs"], flags["num_epochs"]
    benchmark = training_benchmark(own["dataset"])
    if benchmark.schedule_span(before) != benchmark.schedule_span(now):
        raise InputError(
            f"--num-epochs {now}: {flags['resume']} was started with --num-epochs {before}, and "
            f"{benchmark.name}'s learning rate schedule spans {benchmark.schedule_in_words}: what is trained "
            "would have been trained with other rates; leave the flag out, or start a new run"
        )
    progress = saved_progress(RunFolder(flags["resume"]))
    done = progress.epoch if progress else 0
    if done >= now:
        raise InputError(
            f"--num-epochs {now}: {flags['resume']} has {done} epochs trained already; give more than "
            f"{done}, or leave the flag out"
        )


def digest_of_data(scored: list[Split], triplets: list[Triplet]) -> str:
    """A digest of what is trained on and scored, wherever it lies; images by their names."""
    digest = hashlib.blake2b(digest_size=16)

    def add(items: Iterable[object]) -> None:
        for item in items:
            digest.update(repr(item).encode())

    for part in (triplets, *(split.triplets for split in scored)):
        add((t.pair_id, t.reference, t.target, t.caption, t.members, t.training_captions) for t in part)
    for split in scored:
        add(split.image_paths)
    return digest.hexdigest()


def digest_of_file(path: Path | None) -> str | None:
    """A digest of a file's bytes; None without one."""
    return None if path is None else file_digest(path)


def check_same(before: dict[str, Any], now: dict[str, str | None], flags: dict[str, Any]) -> None:
    """Raise :class:`InputError` if what a flag points at is not what it was when the run was started."""
    for name, value in now.items():
        if before.get(name, value) != value:
            raise InputError(
                f"{flag(name, flags[name])} holds something else than when {flags['resume']} was started; "
                f"point {flag(name, True)} at the same data again, or start a new run"
            )


def check_left_out(file: Path, left_out: dict[str, dict[str, Any]]) -> None:
    """Raise :class:`InputError` unless a run that goes on misses the images that it missed at its start."""
    if not file.exists():
        raise InputError(f"{file} is missing; restore it, or start a new run with --missing-images skip")
    before = read_json(file)
    try:
        then, now = (
            {f"{name} ({title})" for title, one in found.items() for name in one["images"]}
            for found in (before, left_out)
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file} is broken; restore it from a copy") from error
    if then != now:
        raise InputError(
            f"{file}: the run began without {len(then):,} images, and now {len(now):,} have no file; first "
            f"that differs: {quote(min(then ^ now))}; put the files back as they were, or start a new run"
        )
