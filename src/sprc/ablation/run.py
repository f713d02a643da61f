"""Running the ablation: each cell is one training and its scoring, in processes of their own.

A cell's folder, ``OUT/cells/NAME``, holds the run folder, `log.txt` with what the processes printed, and,
once the cell is done, `ranks.csv` with the rank of every query's target. :mod:`sprc.ablation.report` reads
them. No model is imported here, and torch only to count GPUs: what is run is in other processes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from sprc.ablation.grid import AblationConfig, Cell
from sprc.errors import InputError, Interrupted
from sprc.files import hold_lock, write_json
from sprc.processes import own_cores, stop_signals
from sprc.run_folder import RunFolder
from sprc.settings import ROOT


def check_devices(names: list[str] | None) -> list[str]:
    """The devices, one running cell each: by default every GPU, or the CPU. One may be given more than once.

    Raises :class:`InputError` for one that this machine does not have, and where none is given and torch does
    not reach its GPU. No GPU is touched here.
    """
    if names is not None and all(re.fullmatch("cpu(:0)?", name) for name in names):
        return names
    import torch

    from sprc.models.device import default_device, parse_device

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

    ended = {cell: Event() for cell in cells}

    def work(device: str) -> None:
        while queue and not stop:
            try:
                cell = queue.popleft()
            except IndexError:  # another device took the last one
                return
            first_stage = cell.first_stage  # which came before, and may be at work on another device
            while first_stage is not None and not ended[first_stage].wait(0.1) and not stop:
                pass
            begin = time.monotonic()
            try:
                if first_stage in failures:
                    failure: str | None = f"{first_stage.name}, its start, failed"
                else:
                    failure = run_cell(cell, config, out / "cells" / cell.name, device, environment, stop)
                if failure is not None:
                    failures[cell] = failure
            except OSError as error:  # a full disk, say
                failures[cell] = failure = str(error)
            finally:
                ended[cell].set()
            if stop:
                return
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

    What a second training starts from has to be done. A run that was interrupted goes on from its state; one
    that had none yet is started anew.
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

        first_stage = None
        if cell.first_stage is not None:
            first_run = find_run(folder.parent / cell.first_stage.name)
            assert first_run is not None  # it is done
            first_stage = first_run.only_checkpoint()
        run_folder = find_run(folder)
        if run_folder is not None and not run_folder.state.exists():
            shutil.rmtree(run_folder)
            run_folder = None
        if run_folder is not None:
            failure = run("blip_fine_tune_2.py", "--resume", run_folder.path)
        else:
            keep = ("--models-path", folder, "--save-training", "--save-best")
            start = () if first_stage is None else (first_stage,)
            failure = run("blip_fine_tune_2.py", *config.training, *cell.arguments(), *start, *keep)
            run_folder = find_run(folder)
        if failure is not None or stop:
            return failure
        assert run_folder is not None  # the training has ended well
        settings = json.loads(run_folder.hyperparameters.read_text(encoding="utf-8"))
        own = run_folder.only_checkpoint()
        behind = cell.reranks and first_stage is not None
        model = ("--model-path", first_stage, "--rerank", own) if behind else ("--model-path", own)
        failure = run(
            "blip_validate.py",
            *("--dataset", settings["dataset"], "--data-path", settings["data_path"]),
            *("--fiq-protocol", settings["fiq_protocol"], "--split", split_to_score(settings)),
            *("--missing-images", settings.get("missing_images", "error")),
            *(*model, "--save-ranks", ranks),
        )
        if failure is None and not stop:
            run_folder.state.unlink()  # as large as three models, and of no use any more
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


def find_run(folder: Path) -> RunFolder | None:
    """The run folder inside a cell's folder, if there is one."""
    return next(iter(RunFolder.all_in(folder)), None)


def split_to_score(settings: dict[str, Any]) -> str:
    """What a cell is scored on; ``settings`` are its run's hyperparameters."""
    from sprc.scoring.benchmarks import benchmark_class  # with torch; the first training is over by now

    return benchmark_class(settings["dataset"]).split_to_report(Path(settings["data_path"]))
