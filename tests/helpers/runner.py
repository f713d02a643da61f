"""Run the scripts as users do, in a process of their own, and read what they leave."""

import csv
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One thread, unless the environment says otherwise: a second one has little to do on so small a model, and
# waits badly on a busy machine. The fork server reads it once, when it imports torch. No GPU: what the tests
# expect of the scripts, to the bit for one, holds on the CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Those with two threads of their own would wait for each other for minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
}

# Importing torch takes longer than most scripts then run. So their processes are forked from one that has
# imported what is not ours, and has done nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.utils.data",
        "pandas",
        "matplotlib",
        "transformers.models.bert.tokenization_bert",
    ]
)


def run(script, *arguments, code=0):
    """Run ``src/script`` and return what it printed to stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "stdout"), Path(folder, "stderr")
        command = [str(ROOT / "src" / script), *map(str, arguments)]
        process = FORKS.Process(target=run_command, args=(command, ENVIRONMENT, *printed))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
        stdout, stderr = (path.read_text() for path in printed)
    assert process.exitcode == code, stdout + stderr
    return stdout, stderr


def run_command(command, environment, stdout, stderr):
    """In the forked process: be ``python COMMAND``."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY),
        (2, stderr, os.O_WRONLY),
    ):
        os.dup2(os.open(path, flags | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the user's, not the fork server's
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


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
    runs = sorted(models.glob("clip_finetuned_on_*"))
    return (runs[-1] if runs else None), stdout, stderr


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_one_clear_line(stderr, message):
    lines = [line for line in stderr.splitlines() if line and "it/s]" not in line]
    assert lines[-1].startswith("error: "), stderr
    assert message in lines[-1]
    assert "Traceback" not in stderr
