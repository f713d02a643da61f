"""How long a user waits: for ``--help``, for a search, and for the first step of a training.

All of `tiny`, on built-in data, in processes of their own. Beside another checkout, in turns:

    python benchmarks/startup.py --against FOLDER --repeats 9
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from measure import Row, Settings, in_seconds, keep_compiled, ratio_row, side_by_side, spread, within
from published import HAS_LAVIS

HERE = Path(__file__).resolve().parent.parent
PATIENCE = 300.0  # seconds
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def run(settings: Settings, against: Path | None = None) -> list[Row]:
    """Whole processes, from their start to their end.

    Args:
        settings: how often.
        against: another checkout, whose processes stand beside these; else LAVIS's bare import does, where it
            is installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        keep_compiled(ENVIRONMENT, Path(folder) / "compiled")
        sides = sides_of(HERE, Path(folder), settings)
        if against is not None:
            others = sides_of(against, Path(folder) / "other", settings)
            pairs = [((name, sides[name]), (f"{name} there", others[name])) for name in sides]
            sides = dict(side for pair in pairs for side in pair)
        else:
            sides["import sprc"] = partial(call, sys.executable, "-c", "import sprc", cwd=HERE / "src")
            if HAS_LAVIS:
                sides["LAVIS"] = partial(call, sys.executable, "-W", "ignore", "-c", "import lavis.models")
        sides["import torch"] = partial(call, sys.executable, "-c", "import torch")
        times = side_by_side(sides, settings)
    if against is not None:
        names = [name for name in times if f"{name} there" in times]
        rows = [ratio_row(f"start-up: {n}, here / there", "", times[n], times[f"{n} there"]) for n in names]
        return [*rows, Row("start-up: importing torch", "", spread(times["import torch"], in_seconds))]
    wanted = {"--help": ("under 2 s", 2.0), "import sprc": ("under 0.2 s", 0.2)}
    rows = []
    for name in ("--help", "import sprc", "a query over a small index", FIRST_STEP, "import torch"):
        words, most = wanted.get(name, ("", None))
        reached = within(median(times[name]), None, most)
        rows.append(Row(f"start-up: {name}", words, spread(times[name], in_seconds), reached=reached))
    if HAS_LAVIS:
        rows += [
            ratio_row("start-up: importing LAVIS / our first step", "", times["LAVIS"], times[FIRST_STEP])
        ]
    return rows


FIRST_STEP = "first step of `tiny` on built-in data, its state on disk"


def sides_of(checkout: Path, folder: Path, settings: Settings) -> dict[str, Callable[[], object]]:
    """What is timed of a checkout; it makes its data, its checkpoint and its index in ``folder``."""
    data, models = folder / "data", folder / "models"
    sizes = ("--train-families", 1, "--val-families", 1, "--test-families", 1) if settings.quick else ()
    finish(checkout, "make_demo_data.py", "--out", data, *sizes)
    training = ("--dataset", "CIRR", "--backbone", "tiny", "--data-path", data, "--num-workers", 0)
    training += ("--device", "cpu", "--batch-size", 16)
    once = ("--num-epochs", 1, "--save-training", "--save-best", "--models-path", models)
    finish(checkout, "blip_fine_tune_2.py", *training, *once)
    (checkpoint,) = models.glob("*/saved_models/tuned_clip_arithmetic.pt")
    pictures = data / "cirr_dataset" / "dev"
    index = ("--index", folder / "index", "--device", "cpu")
    finish(checkout, "search.py", "index", pictures, "--model-path", checkpoint, *index)
    query = ("--image", min(pictures.iterdir()), "--text", "make it red")
    return {
        "--help": partial(finish, checkout, "blip_fine_tune_2.py", "--help"),
        "a query over a small index": partial(finish, checkout, "search.py", "query", *index, *query),
        FIRST_STEP: partial(train_until_first_step, checkout, training),
    }


def call(*command: object, cwd: Path | None = None) -> None:
    """Run a command to its end, in silence."""
    subprocess.run(
        [str(part) for part in command],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
        cwd=cwd,
        env=ENVIRONMENT,
    )


def finish(checkout: Path, script: str, *arguments: object) -> None:
    """Run one of a checkout's scripts to its end."""
    call(sys.executable, checkout / "src" / script, *arguments)


def train_until_first_step(checkout: Path, training: tuple[object, ...]) -> None:
    """Start a training and end it when the state after its first step is on disk."""
    with tempfile.TemporaryDirectory() as models:
        command = [sys.executable, checkout / "src" / "blip_fine_tune_2.py", *training]
        command += ["--models-path", models, "--checkpoint-every", 1]
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        try:
            end = time.monotonic() + PATIENCE
            while not any(Path(models).glob("*/saved_models/training_state.pt")):
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    raise RuntimeError(f"no first step: {process.stderr.read()[-500:]}")
                time.sleep(0.005)
        finally:
            process.kill()
            process.communicate()


def main() -> None:
    """Print a row a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, default=None, metavar="FOLDER", help="another checkout")
    parser.add_argument("--repeats", type=int, default=5, help="turns; default: %(default)s")
    arguments = parser.parse_args()
    against = arguments.against and arguments.against.resolve()
    for row in run(Settings("cpu", arguments.repeats, quick=False), against):
        print(f"{row.name}: {row.cell}")


if __name__ == "__main__":
    main()
