"""The ablation's grid, and running it: each cell is one training and its scoring, in processes of their own.

A cell's folder, ``OUT/cells/NAME``, holds the run folder, `log.txt` with what the processes printed, and,
once the cell is done, `ranks.csv` with the rank of every query's target. :mod:`sprc.ablation.report` reads
them.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from sprc.config import FUSION_STARTS, FUSION_TEXTS, POOLS
from sprc.errors import InputError, Interrupted
from sprc.files import hold_lock, write_json
from sprc.flags import ROOT
from sprc.models.device import default_device, own_cores, parse_device
from sprc.models.gated_fusion import FUSION_STRATEGIES, fusion_class
from sprc.scoring.benchmarks import benchmark_class
from sprc.training.fine_tuning import HYPERPARAMETERS
from sprc.training.loop import stop_signals

OFF = "off"
SWITCHES = ("fusion", "alpha", "start", "pool", "text", "rate")  # what a cell is, but for its seed
# What the grid sets itself. argparse takes a flag's beginning for the flag, so those are refused as well.
OWN_FLAGS = (
    "--use-gated-fusion",
    "--no-use-gated-fusion",
    "--fusion-strategy",
    "--alpha-init",
    "--fusion-start",
    "--pool",
    "--fusion-text",
    "--fusion-lr",
    "--seed",
    "--save-training",
    "--save-best",
    "--models-path",
    "--resume",
    "--device",
)


@dataclass(frozen=True)
class Cell:
    """One training of the grid; None stands for a switch that does not touch the fusion."""

    fusion: str
    alpha: float | None
    start: str | None
    pool: str | None
    seed: int
    text: str | None = None  # None also for "embeddings", the default
    rate: float | None = None  # of the fusion's parameters; None is the training's own

    @property
    def variant(self) -> str:
        """The cell's name without its seed: what a row of the table and a line of the plots is."""
        alpha = None if self.alpha is None else f"alpha{self.alpha:g}"
        rate = None if self.rate is None else f"lr{self.rate:g}"
        parts = (self.fusion, alpha, self.start, self.pool, self.text, rate)
        return "-".join(part for part in parts if part is not None)

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.variant}-seed{self.seed}"

    def flags(self) -> list[str]:
        """The cell's flags for ``blip_fine_tune_2.py``."""
        if self.fusion == OFF:
            return ["--no-use-gated-fusion", "--seed", str(self.seed)]
        switches = {"--alpha-init": self.alpha, "--fusion-start": self.start, "--pool": self.pool}
        switches |= {"--fusion-text": self.text, "--fusion-lr": self.rate}
        given = [str(item) for pair in switches.items() if pair[1] is not None for item in pair]
        return ["--use-gated-fusion", "--fusion-strategy", self.fusion, *given, "--seed", str(self.seed)]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """The grid, and the training's own flags. A value that cannot work raises :class:`InputError`.

    A value that is there twice counts once. YAML reads a bare ``off`` as false, which is taken for it.
    ``grids`` are changes to the lists above, each a grid of its own: one switch at a time, say.
    """

    fusion: Sequence[str] = (OFF, "gated")
    alpha: Sequence[float] = (0.5,)
    start: Sequence[str] = ("random",)
    pool: Sequence[str] = ("masked",)
    text: Sequence[str] = ("embeddings",)
    rate: Sequence[float | None] = (None,)  # of the fusion's parameters; None is --learning-rate
    seeds: Sequence[int] = (0, 1, 2)
    training: Sequence[str] = ()  # flags of blip_fine_tune_2.py, as a list
    grids: Sequence[dict[str, Any]] = ()  # none: one grid of the lists above

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name == "grids":
                continue
            empty = not values and field.name != "training"  # whose flags are asked for below
            if isinstance(values, str) or not isinstance(values, Sequence) or empty:
                raise InputError(f"{field.name}={values!r}: give a list of at least one value")
            if field.name == "training":
                checked = tuple(map(str, values))  # YAML gives numbers as numbers
            else:
                checked = tuple(dict.fromkeys(self._checked(field.name, value) for value in values))
            object.__setattr__(self, field.name, checked)
        names = [item.split("=")[0] for item in self.training if item.startswith("--")]
        for name in names:
            if owned := [flag for flag in OWN_FLAGS if flag.startswith(name)]:
                raise InputError(f"{name}: the ablation sets {owned[0]} itself; leave it out of training")
        if "--dataset" not in names:
            raise InputError("the training's flags lack --dataset; give it, and all others, after --")
        if isinstance(self.grids, str) or not isinstance(self.grids, Sequence):
            raise InputError(f"grids={self.grids!r}: give a list of mappings")
        for grid in self.grids:
            if not isinstance(grid, dict) or not set(grid) <= set(SWITCHES):
                raise InputError(f"grids: {grid!r} is no mapping of {', '.join(SWITCHES)} to lists")
            replace(self, grids=(), **grid)  # its values are checked here

    @staticmethod
    def _checked(name: str, value: Any) -> Any:
        if name == "fusion" and value is False:
            value = OFF
        choices = {"fusion": (OFF, *FUSION_STRATEGIES), "start": FUSION_STARTS, "pool": POOLS}
        choices["text"] = FUSION_TEXTS
        if name in choices:
            if value not in choices[name]:
                raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(choices[name])}")
            return value
        if name == "alpha":
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"alpha={value!r} must be a finite number")
            return float(value)
        if name == "rate":
            if value is None:
                return None
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise InputError(f"rate={value!r} must be a positive number")
            return float(value)
        if type(value) is not int or value < 0:
            raise InputError(f"seeds={value!r} must be a whole number of at least 0")
        return value

    @classmethod
    def read(cls, path: Path | None, given: dict[str, Any]) -> "AblationConfig":
        """The values of a YAML file, if any, under those of the command line.

        Raises :class:`InputError` for a file that cannot be read, an unknown key, a wrong value.
        """
        values: Any = {}
        if path is not None:
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"--config {path} cannot be read ({error}); give a YAML file") from error
            known = [field.name for field in fields(cls)]
            if not isinstance(values, dict) or (unknown := sorted(map(str, set(values) - set(known)))):
                wrong = f"unknown key {', '.join(unknown)}" if isinstance(values, dict) else "no mapping"
                raise InputError(f"--config {path}: {wrong}; its keys are {', '.join(known)}")
        return cls(**{**values, **given})

    def cells(self) -> list[Cell]:
        """The grids' cells, each once: a switch that does not touch a fusion does not multiply it.

        The first seed's cells come first, so that a grid that is stopped early compares all its variants.
        """
        grids = [replace(self, grids=(), **grid) for grid in self.grids] or [self]
        cells = {
            cell_of(*values, seed): None
            for seed in self.seeds
            for grid in grids
            for values in product(*(getattr(grid, name) for name in SWITCHES))
        }
        return list(cells)


def cell_of(
    fusion: str, alpha: float, start: str, pool: str, text: str, rate: float | None, seed: int
) -> Cell:
    """The cell of these switches, without those that do not touch its fusion."""
    if fusion == OFF:
        return Cell(OFF, None, None, None, seed)
    has_alpha, has_identity = switches_of(fusion)
    contextual = text == "contextual"
    return Cell(
        fusion,
        alpha if has_alpha else None,
        start if has_identity else None,
        "masked" if contextual else pool,  # contextual words have no padding
        seed,
        text if contextual else None,
        rate,
    )


@cache
def switches_of(strategy: str) -> tuple[bool, bool]:
    """Whether a strategy has an alpha, and whether it has an identity start: asked of the strategy itself."""
    has_alpha = hasattr(fusion_class(strategy)(2, 2), "alpha")
    try:
        fusion_class(strategy)(2, 2, start="identity")
    except InputError:
        return has_alpha, False
    return has_alpha, True


def check_devices(names: list[str] | None) -> list[str]:
    """The devices, one running cell each: by default every GPU, or the CPU. One may be given more than once.

    Raises :class:`InputError` for one that this machine does not have, and where none is given and torch does
    not reach its GPU. No GPU is touched here.
    """
    if names is None and default_device() == "cpu":
        return ["cpu"]
    count = torch.cuda.device_count()
    if names is None:
        return [f"cuda:{index}" for index in range(count)]
    for name in names:
        device = parse_device(name, "--devices")
        if device.type == "cuda" and (device.index or 0) >= count:
            raise InputError(f"--devices {name!r}: this machine has {count} GPUs; give others, or cpu")
    return names


def run_cells(config: AblationConfig, out: Path, devices: list[str]) -> dict[Cell, str]:
    """Run the grid's cells that are not done, one at a time on each device.

    Returns:
        The cells that failed, each with the last line that it wrote; they do not stop the others.

    Raises:
        InputError: ``out`` was made with other training flags, or cannot be written.
        Interrupted: SIGINT or SIGTERM came; the running cells have saved their state.
    """
    claim(out, config)
    cells = config.cells()
    queue = deque(cells)
    failures: dict[Cell, str] = {}
    environment = cell_environment(len(devices))

    def work(device: str) -> None:
        while queue and not stop:
            try:
                cell = queue.popleft()
            except IndexError:  # another device took the last one
                return
            begin = time.monotonic()
            try:
                failure = run_cell(cell, config, out / "cells" / cell.name, device, environment, stop)
            except OSError as error:  # a full disk, say
                failure = str(error)
            if stop:
                return
            if failure is not None:
                failures[cell] = failure
            minutes = (time.monotonic() - begin) / 60
            tqdm.write(f"{cell.name}: {f'failed: {failure}' if failure else f'done, {minutes:.1f} min'}")
            bar.update()

    with (
        stop_signals() as stop,
        tqdm(total=len(cells), desc="ablation", unit="cell") as bar,
        ThreadPoolExecutor(len(devices)) as pool,
    ):
        futures = [pool.submit(work, device) for device in devices]
        wait(futures)
    for future in futures:
        future.result()
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name}; the same command goes on", flush=True)
        raise Interrupted(stop[0])
    return {cell: failures[cell] for cell in cells if cell in failures}


def claim(out: Path, config: AblationConfig) -> None:
    """Make ``out``, or check that its cells were trained with the same flags: else they do not compare."""
    path = out / "training_flags.json"
    try:
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != list(config.training):
                raise InputError(
                    f"{path} says other training flags than now; give another --out, or delete it"
                )
            return
        (out / "cells").mkdir(parents=True, exist_ok=True)
        write_json(path, list(config.training))
    except OSError as error:
        raise InputError(f"--out {out} cannot be used ({error}); choose another folder") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is broken; restore it, or choose another --out") from error


def cell_environment(num_devices: int) -> dict[str, str]:
    """The cells' environment: the cores shared out, if OMP_NUM_THREADS does not say otherwise.

    SPRC_SWITCHES is left out: it would change cells behind the table's back.
    """
    cores = own_cores()
    environment = {"OMP_NUM_THREADS": str(max(1, cores // num_devices)), **os.environ}
    environment.pop("SPRC_SWITCHES", None)
    # In the log a failure's last line has to come after what was printed before it.
    return {**environment, "PYTHONUNBUFFERED": "1"}


def run_cell(
    cell: Cell,
    config: AblationConfig,
    folder: Path,
    device: str,
    environment: dict[str, str],
    stop: list[int],
) -> str | None:
    """Train and score a cell, unless it is done; return None, or what went wrong in one line.

    A run that was interrupted goes on from its state; one that had none yet is started anew.
    """
    ranks = folder / "ranks.csv"
    folder.mkdir(exist_ok=True)
    # The cell's processes inherit the lock: a training outlives a killed ablation, and the next one waits
    # here until it has ended, then goes on from it.
    waiting = f"{cell.name}: waiting for a process of another ablation to end"
    unwritable = "give --out a folder that can be written"
    with hold_lock(folder / "lock", waiting=waiting, unwritable=unwritable, stop=stop) as lock:
        if stop or ranks.exists():
            return None

        def run(script: str, *flags: str | Path) -> str | None:
            command = [sys.executable, str(ROOT / "src" / script), *map(str, flags), "--device", device]
            return run_process(command, folder / "log.txt", environment, lock, stop)

        run_folder = find_run(folder)
        if run_folder is not None and not state_of(run_folder).exists():
            shutil.rmtree(run_folder)
            run_folder = None
        if run_folder is not None:
            failure = run("blip_fine_tune_2.py", "--resume", run_folder)
        else:
            keep = ("--models-path", folder, "--save-training", "--save-best")
            failure = run("blip_fine_tune_2.py", *config.training, *cell.flags(), *keep)
            run_folder = find_run(folder)
        if failure is not None or stop:
            return failure
        settings = json.loads((run_folder / HYPERPARAMETERS).read_text(encoding="utf-8"))
        failure = run(
            "blip_validate.py",
            *("--dataset", settings["dataset"], "--data-path", settings["data_path"]),
            *("--fiq-protocol", settings["fiq_protocol"], "--split", split_to_score(settings)),
            *("--missing-images", settings.get("missing_images", "error")),
            *("--model-path", checkpoint_of(run_folder), "--save-ranks", ranks),
        )
        if failure is None and not stop:
            state_of(run_folder).unlink()  # as large as three models, and of no use any more
        return failure


def run_process(
    command: list[str], log: Path, environment: dict[str, str], lock: int | None, stop: list[int]
) -> str | None:
    """Run ``command``, appending what it prints to ``log``; None, or the last line of a run that failed.

    Once ``stop`` holds a signal the process is asked to end, and is waited for.
    """
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode(errors="backslashreplace"))
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[] if lock is None else [lock],
        )
        asked = False
        while process.poll() is None:
            if stop and not asked:
                process.terminate()
                asked = True
            time.sleep(0.1)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    printed = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", printed) if line.strip()]
    return lines[-1] if lines else f"exit code {process.returncode}, nothing printed"


def find_run(folder: Path) -> Path | None:
    """The run folder inside a cell's folder, if there is one."""
    return next(iter(sorted(folder.glob("clip_finetuned_on_*"))), None)


def state_of(run_folder: Path) -> Path:
    """Where the training loop keeps its state."""
    return run_folder / "saved_models" / "training_state.pt"


def checkpoint_of(run_folder: Path) -> Path:
    """The one checkpoint of a run with ``--save-best``: its best epoch on the validation split."""
    return next((run_folder / "saved_models").glob("tuned_clip_*.pt"))


def split_to_score(settings: dict[str, Any]) -> str:
    """What a cell is scored on; ``settings`` are its run's hyperparameters."""
    return benchmark_class(settings["dataset"]).split_to_report(Path(settings["data_path"]))
