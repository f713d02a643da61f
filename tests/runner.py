"""Run the scripts as users do, in a subprocess, and read what they leave."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One thread: a second one has little to do on so small a model, and waits badly on a busy machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(script, *arguments, code=0):
    """Run ``src/script`` and return what it printed to stdout and stderr."""
    command = [sys.executable, str(ROOT / "src" / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def train(data, models, *flags, code=0):
    """A short training of `tiny`; returns the run folder, stdout and stderr."""
    settings = {"--num-epochs": 1, "--batch-size": 16, "--learning-rate": 1e-3, "--num-workers": 0}
    given = [item for pair in settings.items() if pair[0] not in flags for item in pair]
    stdout, stderr = run(
        "blip_fine_tune_2.py",
        *("--dataset", "CIRR", "--backbone", "tiny", "--data-path", data, "--models-path", models),
        *given,
        *flags,
        code=code,
    )
    runs = sorted(models.glob("clip_finetuned_on_cirr_blip2_cir_align_prompt_*"))
    return (runs[-1] if runs else None), stdout, stderr


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_one_clear_line(stderr, message):
    lines = [line for line in stderr.splitlines() if line and "it/s]" not in line]
    assert lines[-1].startswith("error: "), stderr
    assert message in lines[-1]
    assert "Traceback" not in stderr
