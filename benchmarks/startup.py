"""How long a user waits: for ``--help``, and for the first step of a training of `tiny` on built-in data."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from measure import Row, Settings, in_seconds, ratio_row, side_by_side, spread, within
from published import HAS_LAVIS

SCRIPTS = Path(__file__).resolve().parent.parent / "src"
PATIENCE = 300.0  # seconds


def run(settings: Settings) -> list[Row]:
    """Whole processes, from their start. Where LAVIS is installed, its bare import stands beside them."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        sizes = ("--train-families", 1, "--val-families", 1, "--test-families", 1) if settings.quick else ()
        finish("make_demo_data.py", "--out", data, *sizes)
        sides: dict[str, Callable[[], object]] = {
            "help": partial(finish, "blip_fine_tune_2.py", "--help"),
            "first step": partial(train_until_first_step, data),
        }
        if HAS_LAVIS:
            sides["LAVIS"] = partial(call, sys.executable, "-W", "ignore", "-c", "import lavis.models")
        times = side_by_side(sides, settings)
    rows = [
        Row(
            "start-up: --help",
            "under 2 s",
            spread(times["help"], in_seconds),
            reached=within(median(times["help"]), None, 2),
        ),
        Row(
            "start-up: first step of `tiny` on built-in data, its state on disk",
            "",
            spread(times["first step"], in_seconds),
        ),
    ]
    if HAS_LAVIS:
        rows += [
            ratio_row("start-up: importing LAVIS / our first step", "", times["LAVIS"], times["first step"])
        ]
    return rows


def call(*command: object) -> None:
    """Run a command to its end, in silence."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=PATIENCE)


def finish(script: str, *arguments: object) -> None:
    """Run one of the project's scripts to its end."""
    call(sys.executable, SCRIPTS / script, *arguments)


def train_until_first_step(data: Path) -> None:
    """Start a training and end it when the state after its first step is on disk."""
    with tempfile.TemporaryDirectory() as models:
        command = [sys.executable, SCRIPTS / "blip_fine_tune_2.py", "--dataset", "CIRR", "--backbone", "tiny"]
        command += ["--data-path", data, "--models-path", models, "--device", "cpu", "--num-workers", "0"]
        command += ["--batch-size", "16", "--checkpoint-every", "1"]
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
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
