"""Running a recipe: its stages one after the other, each a run in a folder of its own.

    MODELS_PATH/RECIPE/recipe.csv            a row a stage that is done: its best epoch, and its metrics
    MODELS_PATH/RECIPE/STAGE/stage.json      the flags that it was begun with
    MODELS_PATH/RECIPE/STAGE/finished.json   once it is done: its run, its best epoch, its metrics
    MODELS_PATH/RECIPE/STAGE/clip_finetuned_on_...   the run

The same command goes on after a kill at any moment. All stages run in this process, so that torchrun's ranks
are joined once. A run depends on nothing but its flags: each stage's is to the bit the one that they alone
would make.
"""

import csv
import gc
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sprc.distributed import from_main
from sprc.errors import InputError, Interrupted
from sprc.files import absolute, write_csv, write_json
from sprc.run_folder import RunFolder, find_checkpoint
from sprc.scoring.benchmarks import training_benchmark
from sprc.training.fine_tuning import check_flags, fine_tune
from sprc.training.recipe_file import Stage, read_recipe
from sprc.training.resume import MAY_DIFFER, flag

# What may differ when a recipe goes on. Of a stage that is done more epochs would be no other.
FREE = MAY_DIFFER - {"num_epochs"}
KEEP = {"save_training": True, "save_best": True}  # the next stage starts from the best


def run_recipe(defaults: dict[str, Any], given: dict[str, Any]) -> Path:
    """Run the stages of ``--recipe``, or go on with them; return the folder of all.

    The recipe, and the flags of all its stages, are checked before the first begins.

    Args:
        defaults: of all flags of ``blip_fine_tune_2.py``.
        given: the flags that were given. They are for all stages; ``--model-path`` is for those that start
            from no other.

    Raises:
        InputError: the recipe is wrong, or a stage was begun with other flags.
        Interrupted: a signal asked the run to stop; its state is saved.
    """
    stages = read_recipe(given["recipe"], given)
    for stage in stages:
        try:
            check_flags(defaults, stage.given, starts=stage.start is not None)
        except InputError as error:
            raise InputError(f"--recipe {given['recipe']}: stage {stage.name}: {error}") from error
    folder = absolute(given.get("models_path", defaults["models_path"])) / given["recipe"].stem
    for stage in stages:
        check_begun(folder / stage.name, stage)
    done: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, start=1):
        start = f", from {stage.start}" if stage.start else ""
        print(f"stage {number} of {len(stages)}: {stage.name}{start}", flush=True)
        try:
            done[stage.name] = run_stage(defaults, stage, folder, done)
        except Interrupted:
            with suppress(OSError):  # the terminal may be gone, which SIGHUP tells of
                print(f"stopped in stage {stage.name}; the recipe's command goes on, too", flush=True)
            raise
        write_csv(folder / "recipe.csv", [row_of(name, found) for name, found in done.items()])
    for stage in stages:
        print(f"{stage.name}: {told(stage, done[stage.name])}", flush=True)
    print(f"table: {folder / 'recipe.csv'}", flush=True)
    return folder


def check_begun(place: Path, stage: Stage) -> None:
    """Raise :class:`InputError` if the stage was begun in ``place`` with other flags, or from another."""
    path = place / "stage.json"
    if not path.exists():
        return
    before, now = read(path), record(stage)
    flags = before.get("flags")
    if not isinstance(flags, dict):
        raise InputError(f"{path} is broken; restore it, or delete {place} to train the stage again")
    if before.get("start") != now["start"]:
        raise InputError(
            f"{path}: stage {stage.name} began from {before.get('start')} and now starts from {stage.start}; "
            "give another --models-path, or rename the recipe"
        )
    for name in sorted({*flags, *now["flags"]}):
        if flags.get(name) != now["flags"].get(name):
            raise InputError(
                f"{path}: stage {stage.name} began with {flag(name, flags.get(name))}, and now has "
                f"{flag(name, now['flags'].get(name))}; give another --models-path, or rename the recipe"
            )


def record(stage: Stage) -> dict[str, Any]:
    """What must stay of a stage that has begun, as JSON holds it."""
    flags = {name: value for name, value in stage.given.items() if name not in FREE}
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return {"start": stage.start, "flags": kept}


def run_stage(
    defaults: dict[str, Any], stage: Stage, folder: Path, done: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Run a stage of the recipe in ``folder`` unless it is done; what its `finished.json` says.

    Args:
        defaults: of all flags.
        stage: the stage.
        folder: of the recipe.
        done: what those of the stages before say.
    """
    place = folder / stage.name
    finished = place / "finished.json"
    if from_main(finished.exists):
        print(f"done already: {place}", flush=True)
        return from_main(lambda: read(finished))
    from_main(lambda: place.mkdir(parents=True, exist_ok=True))
    write_json(place / "stage.json", record(stage))
    flags = {**stage.given, **KEEP, "models_path": place}
    if stage.start is not None:
        run = folder / stage.start / str(done[stage.start].get("run"))
        flags["model_path"] = from_main(lambda: find_checkpoint(run))
    if (begun := from_main(lambda: find_begun(place))) is not None:
        flags = {name: value for name, value in flags.items() if name in MAY_DIFFER} | {"resume": begun}
    path = fine_tune(defaults, flags)
    # The model of a stage is gone before that of the next is made.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = from_main(lambda: best_of(RunFolder(path), stage.given["dataset"]))
    write_json(finished, found)
    return found


def find_begun(place: Path) -> Path | None:
    """The run in ``place`` that goes on; one that was killed before it wrote its flags is deleted."""
    for run in RunFolder.all_in(place):
        if run.hyperparameters.exists():
            return run.path
        shutil.rmtree(run)
    return None


def best_of(run: RunFolder, dataset: str) -> dict[str, Any]:
    """The best validation of a run: its folder's name, the epoch and the metrics."""
    criterion = training_benchmark(dataset).criterion
    with run.validation_metrics.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row[criterion]))  # the first of equal ones, as is kept
    epoch = int(best.pop("epoch"))
    return {"run": run.path.name, "epoch": epoch, "metrics": {k: number(v) for k, v in best.items()}}


def number(text: str) -> float | str:
    """What a CSV file's cell holds."""
    try:
        return float(text)
    except ValueError:
        return text


def row_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A stage's row of the table."""
    return {"stage": name, "run": found["run"], "epoch": found["epoch"], **found["metrics"]}


def told(stage: Stage, found: dict[str, Any]) -> str:
    """A stage's line of the printed table."""
    metrics = found["metrics"]
    benchmark = training_benchmark(stage.given["dataset"])([], metrics.get("protocol"))
    return f"epoch {found['epoch']}, {benchmark.shown(metrics)}"


def read(path: Path) -> dict[str, Any]:
    """A JSON file that a recipe's run has written; :class:`InputError` where it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is broken; restore it, or delete {path.parent} to train the stage again")
    return found
