"""The machine: card, driver and wheel, memory, shared memory, cores, disk."""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from sprc.data.shared_memory import SHARED_MEMORY, check_shared_memory
from sprc.errors import InputError
from sprc.models.device import (
    SHORT,
    default_device,
    find_driver,
    gpus_are_hidden,
    precision,
    sees_gpu,
    start_device,
    why_no_gpu,
)
from sprc.processes import own_cores
from sprc.self_check.report import FAIL, NOTE, OK, Line
from sprc.self_check.setting import Setting

# Pixels of a batch of 64 triplets, two images each, in float32.
BATCH_BYTES = 64 * 2 * 3 * 224 * 224 * 4
LEAST_WORKERS = 2
# A run keeps its state (weights and AdamW's two moments, 12 bytes for each of 2 x 10^8 parameters), its best
# checkpoint (4 bytes), and while it writes one of them anew a second copy.
RUN_BYTES = 8e9
LEAST_GPU_BYTES = 10e9
CACHE = "a feature cache takes 16 GB for CIRR, 54 GB for FashionIQ"


def find_device(name: str | None) -> tuple[torch.device, Line | None]:
    """``--device``, and where it is a GPU that cannot be had, the CPU and a line that says so.

    Raises :class:`InputError` for a name that is none.
    """
    try:
        return start_device(name or default_device(), "auto"), None
    except InputError as error:
        if name is not None and not name.startswith("cuda"):
            raise
        cpu, what_follows = torch.device("cpu"), "what follows is done on the CPU"
        if gpus_are_hidden():
            return cpu, Line(NOTE, "device", f"CUDA_VISIBLE_DEVICES hides all GPUs; {what_follows}")
        if not sees_gpu() and why_no_gpu() is None:
            return cpu, Line(NOTE, "device", f"no NVIDIA GPU is to be seen on this machine; {what_follows}")
        return cpu, Line(FAIL, "device", f"{error} ({what_follows})")


def check_machine(setting: Setting) -> Iterator[Line]:
    """What training will need, before it is needed."""
    if setting.on_gpu:
        yield from check_card(setting.device)
    yield check_shm()
    figures = f"{own_cores()} of {os.cpu_count()} cores are given to this process"
    if setting.on_gpu and own_cores() < 4:
        remedy = "reading pictures will hold the GPU up; ask for 8 cores, or give --feature-cache DIR"
        yield Line(NOTE, "machine, cores", figures, remedy)
    else:
        yield Line(OK, "machine, cores", figures)
    free = shutil.disk_usage(Path.cwd()).free
    figures = f"{free / 1e9:.0f} GB free here; a run keeps up to {RUN_BYTES / 1e9:.0f}, {CACHE}"
    remedy = "free some, or give --models-path a folder on another disk"
    if free > RUN_BYTES:
        yield Line(OK, "machine, disk", figures)
    else:
        yield Line(FAIL, "machine, disk", figures, remedy)


def check_card(device: torch.device) -> Iterator[Line]:
    """The card, what the wheel holds for it, and its free memory."""
    driver = find_driver()
    major, minor = torch.cuda.get_device_capability(device)
    wheel = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    kernels = " ".join(torch.cuda.get_arch_list()) or "not told"
    yield Line(
        OK,
        "machine, card",
        f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, --amp auto is "
        f"{SHORT[precision('auto', device)]}; driver {(driver and driver.version) or 'not told'}; "
        f"{wheel}, kernels {kernels}",
    )
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        yield Line(NOTE, "machine, memory", "this device does not tell its memory")
        return
    figures = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
    if free < LEAST_GPU_BYTES:
        remedy = (
            "end what else uses it (nvidia-smi); for so little give --feature-cache DIR and --grad-cache 8"
        )
        yield Line(NOTE, "machine, memory", figures, remedy)
    else:
        yield Line(OK, "machine, memory", figures)


def check_shm() -> Line:
    """Whether batches of pixels fit through the memory that workers share with the trainer."""
    name = "machine, shared memory"
    if not SHARED_MEMORY.is_dir():
        return Line(OK, name, f"{platform.system()} keeps it without a limit of its own")
    free = shutil.disk_usage(SHARED_MEMORY).free
    figures = f"{free / 1e9:.2f} GB free in {SHARED_MEMORY}, enough for {LEAST_WORKERS} workers at batch 64"
    try:
        check_shared_memory(BATCH_BYTES, LEAST_WORKERS)
    except InputError as error:
        return Line(FAIL, name, f"{free / 1e6:.0f} MB free", str(error))
    return Line(OK, name, figures)


def facts(setting: Setting) -> dict[str, str]:
    """What a report is headed with."""
    driver = find_driver() if setting.on_gpu else None
    versions = f"{torch.__version__}, Python {platform.python_version()}"
    told = {"torch": versions, "shapes": setting.shapes.told}
    if setting.on_gpu:
        name = torch.cuda.get_device_name(setting.device)
        return {"card": f"{name}, driver {(driver and driver.version) or 'not told'}", **told}
    return {"device": f"CPU, {torch.get_num_threads()} threads, no GPU", **told}
