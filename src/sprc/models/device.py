"""The device that a script computes on: which one, whether torch can use it, and what to do where it cannot.

A GPU that is there and not used costs days before somebody looks. So a script says in its first line what it
computes on, and stops where the machine shows a GPU that torch does not reach, unless ``--device`` is given.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from torch import nn

from sprc.distributed import local_rank, objects_of_all_ranks, rank, sees_gpu, world_size
from sprc.errors import InputError, OutOfResources, ran_out_of_memory

INSTALL = "https://pytorch.org/get-started/locally/"
# The least driver for a CUDA of this major number, of all its minor ones.
LEAST_DRIVER = {"13": 580, "12": 525, "11": 450}
# Its wheels have kernels from compute capability 5.0 on; those of CUDA 13 from 7.5 on.
OLDER_WHEEL = "a PyTorch wheel for CUDA 12.6"
OLDER_WHEEL_FROM = (5, 0)
OLDER_WHEEL_DRIVER = 525
# What CUDA_VISIBLE_DEVICES holds where no GPU is to be used; the last one is Slurm's.
NO_GPU = ("", "-1", "NoDevFiles")
M = TypeVar("M", bound=nn.Module)
MOST_WORKERS = 12  # each holds batches in shared memory
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}


def start_device(name: str | None, amp: str = "off", file: TextIO | None = None) -> torch.device:
    """:func:`choose_device`, and one printed line that says what it is. A script calls it once.

    Args:
        name: ``--device``.
        amp: ``--amp``.
        file: where the line goes; by default stdout.
    """
    device = choose_device(name, amp)
    print(device_line(device, amp), file=file, flush=True)
    return device


def device_line(device: torch.device, amp: str = "off") -> str:
    """What a run computes on: device, its name and memory, precision, and how many ranks there are."""
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        parts = [str(device), told.name, f"{told.total_memory / 2**30:.1f} GiB"]
    else:
        threads = torch.get_num_threads()
        parts = [str(device), f"{threads} thread{'s' * (threads != 1)}"]
    parts.append(SHORT[precision(amp, device)])
    if world_size() > 1:
        parts.append(f"{world_size()} ranks")
    hidden = " (CUDA_VISIBLE_DEVICES hides all GPUs)" if device.type == "cpu" and gpus_are_hidden() else ""
    return f"device: {', '.join(parts)}{hidden}"


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that mixed precision computes in: ``--amp`` on ``device``; None is float32 throughout.

    "auto" is bfloat16 on a GPU that has it, float16 on another, and off on a CPU.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def choose_device(name: str | None, amp: str = "off") -> torch.device:
    """``--device``, by default a GPU if there is one, made the current one; each rank takes its own.

    A GPU is tried with a matrix product in the precision of ``amp``.

    Raises:
        InputError: the device cannot be used; or none is given, and the machine has a GPU that torch does
            not reach. The message says why, and what to do.
    """
    device = parse_device(default_device() if name is None else name)
    if device.type == "cpu":
        return device
    if not sees_gpu():
        hidden = "CUDA_VISIBLE_DEVICES hides all GPUs; unset it" if gpus_are_hidden() else None
        reason = hidden or why_no_gpu() or "no NVIDIA GPU is to be seen on this machine; use another"
        raise InputError(f"--device {name!r} cannot be used: {reason}, or give --device cpu")
    if world_size() > 1:
        device = gpu_of_rank(device)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InputError(
            f"--device {name!r} cannot be used: this machine shows {count} GPU{'s' * (count > 1)}, "
            f"numbered from 0; give {'cuda' if count == 1 else f'cuda:0 to cuda:{count - 1}'}, or cpu"
        )
    device = torch.device("cuda", device.index or 0)
    # The current one, or what says only "cuda" would make a context on the first GPU.
    torch.cuda.set_device(device)
    try_gpu(device, precision(amp, device) or torch.float32)
    return device


def parse_device(name: str, flag: str = "--device") -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; anything else raises :class:`InputError`."""
    if not re.fullmatch(r"cpu(:0)?|cuda(:[0-9]{1,3})?", name):
        raise InputError(f"{flag} {name!r} cannot be used: give cpu or cuda (cuda:1, ...)")
    return torch.device("cpu") if name.startswith("cpu") else torch.device(name)


def default_device() -> str:
    """``cuda``, or ``cpu`` where there is no GPU or it is hidden.

    Raises :class:`InputError` where there is one that torch does not reach.
    """
    if sees_gpu():
        return "cuda"
    if not gpus_are_hidden() and (reason := why_no_gpu()):
        raise InputError(f"{reason}, or give --device cpu to compute without the GPU")
    return "cpu"


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES says that no GPU is to be used."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in NO_GPU


def gpu_of_rank(device: torch.device) -> torch.device:
    """This rank's GPU: that of its number on its machine, or the only one that it is shown.

    Slurm's --gpus-per-task shows each rank one GPU, which is number 0 for all of them.
    Raises :class:`InputError` for a rank without a GPU and where ranks would share one.
    """
    if device.index is not None:
        raise InputError(f"--device '{device}' would be that of all ranks; give cuda, and each takes its own")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank()
    identity = None
    if index < count:
        told = torch.cuda.get_device_properties(index)
        # An older torch does not tell the GPU's own number.
        shown_as = f"{index} of {os.environ.get('CUDA_VISIBLE_DEVICES')}"
        identity = (socket.gethostname(), str(getattr(told, "uuid", shown_as)))
    of_ranks = objects_of_all_ranks(identity)
    if identity is None or of_ranks.index(identity) != rank():
        raise InputError(
            f"local rank {local_rank()} has no GPU of its own: {count} "
            f"{'is' if count == 1 else 'are'} shown to it; give torchrun --nproc-per-node as many as this "
            "machine has, or --device cpu"
        )
    return torch.device("cuda", index)


def try_gpu(device: torch.device, dtype: torch.dtype) -> None:
    """Compute a matrix product on a GPU; :class:`InputError` says which wheel has the kernels it lacks."""
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    gpu = f"{device} ({name}, compute capability {'.'.join(map(str, capability))})"
    wheel = f"PyTorch {torch.__version__} (CUDA {torch.version.cuda})"
    # AMD's have other names, and are not compared.
    names = (re.fullmatch(r"(sm|compute)_(\d+)(\d)(\w?)", arch) for arch in torch.cuda.get_arch_list())
    kernels = [kernel for kernel in names if kernel is not None]
    if kernels and not any(runs_on(kernel, capability) for kernel in kernels):
        least = min((int(kernel[2]), int(kernel[3])) for kernel in kernels)
        remedy = f"install {OLDER_WHEEL} ({INSTALL})"
        if capability > least:
            remedy = f"install a newer PyTorch ({INSTALL})"
        elif capability < OLDER_WHEEL_FROM:
            remedy = "take a newer GPU"
        raise InputError(
            f"{gpu} cannot be used: the kernels of {wheel} begin at {least[0]}.{least[1]}, and none of them "
            f"is for this GPU; {remedy}, or give --device cpu"
        )
    try:
        values = torch.ones(64, 64, dtype=dtype, device=device)
        (values @ values).sum().item()  # waits for the GPU
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise OutOfResources(
                f"{gpu} has no memory left{memory_of(device)}; end what else uses it (see nvidia-smi), or "
                "give another --device"
            ) from error
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{gpu} cannot compute with {wheel} ({reason}); see in nvidia-smi whether other processes hold "
            f"it, install another wheel ({INSTALL}), or give --device cpu"
        ) from error


def runs_on(kernel: re.Match[str], capability: tuple[int, int]) -> bool:
    """Whether a wheel's kernel, such as sm_80 or compute_90, runs on a GPU of this compute capability.

    sm_XY is machine code for X.Y and what follows it with the same X; compute_XY is compiled on the GPU, for
    X.Y and all that follows; with an a it is for X.Y alone.
    """
    kind, made_for, suffix = kernel[1], (int(kernel[2]), int(kernel[3])), kernel[4]
    if suffix == "a":
        return made_for == capability
    return made_for <= capability and (kind == "compute" or made_for[0] == capability[0])


# --- GPUs that torch does not reach


@dataclass(frozen=True)
class Driver:
    """What a machine shows of NVIDIA GPUs without torch."""

    version: str | None  # of the driver, such as "535.104.05"; None where it does not say
    nodes: tuple[Path, ...]  # the devices that a process opens


def find_driver(root: Path = Path("/")) -> Driver | None:
    """The NVIDIA driver of this machine, or of the one whose files lie below ``root``; None without a GPU."""
    nodes = [node for node in (root / "dev" / "nvidiactl", root / "dev" / "nvidia0") if node.exists()]
    # Windows' Linux has a device of its own, for GPUs of all makers.
    windows = root / "dev" / "dxg"
    if windows.exists() and any((root / "usr/lib/wsl/lib").glob("libcuda.so*")):
        nodes.append(windows)
    text: str | None
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ask_nvidia_smi()
        if text is None and not nodes:
            return None
    found = re.search(r"(?<![\d.])\d{3}(\.\d+)+", text or "")
    return Driver(found and found[0], tuple(nodes))


def ask_nvidia_smi() -> str | None:
    """The driver's version as nvidia-smi tells it; None where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def why_no_gpu(root: Path = Path("/")) -> str | None:
    """Why torch finds no GPU on a machine that has one, and what to do; None where it has none."""
    driver = find_driver(root)
    if driver is None:
        return None
    wheel, cuda = f"PyTorch {torch.__version__}", torch.version.cuda
    version = f"driver {driver.version}" if driver.version else "a driver"
    here = f"this machine has an NVIDIA GPU ({version})"
    if cuda is None:
        return f"{here}, but {wheel} is built without CUDA; install a wheel with it ({INSTALL})"
    major = int(driver.version.split(".")[0]) if driver.version else None
    least = LEAST_DRIVER.get(cuda.split(".")[0])
    if major is not None and least is not None and major < least:
        other = f", or install {OLDER_WHEEL} ({INSTALL})" if major >= OLDER_WHEEL_DRIVER else ""
        return (
            f"{here}, but {wheel} is built for CUDA {cuda}, which needs driver {least} or newer; update the "
            f"driver{other}"
        )
    if sys.platform == "linux":
        if not driver.nodes:
            return (
                f"{here}, but no device file of it is here, as in a container that is given no GPU; start it "
                "with --gpus all (docker run) or --nv (apptainer)"
            )
        if closed := [node for node in driver.nodes if not can_open(node)]:
            return (
                f"{here}, but {closed[0]} may not be opened here; ask the scheduler for a GPU (Slurm: "
                "--gpus-per-node), or the administrator for the right to use it"
            )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"{here}, but CUDA_VISIBLE_DEVICES={visible} names no GPU of it; correct it or unset it"
    try:
        torch.cuda.init()
        reason = "no reason is told"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    return f"{here}, but {wheel} for CUDA {cuda} does not reach it ({reason}); see whether nvidia-smi does"


def can_open(node: Path) -> bool:
    """Whether this process may use a device file. A scheduler's rules do not show in its permissions."""
    try:
        os.close(os.open(node, os.O_RDWR))
    except OSError:
        return False
    return True


# --- memory

# What helps where memory runs out in scoring, best first.
SCORING_HELPS = ("a smaller --batch-size", "--save-memory", "--gallery-dtype float16")


def training_helps(grad_cache: int, *, has_cache: bool, frozen_vit: bool) -> list[str]:
    """What helps where memory runs out in training, best first: flags that are not in use yet."""
    helps = [f"--grad-cache below {grad_cache}" if grad_cache else "--grad-cache 16, at the same result"]
    if frozen_vit and not has_cache:
        helps.append("--feature-cache DIR")
    return [*helps, "a smaller --batch-size"]


@contextmanager
def memory_explained(device: torch.device, batch_size: int, helps: Iterable[str]) -> Iterator[None]:
    """Within it an error of memory, the GPU's or the CPU's, is one line.

    Args:
        device: that computes.
        batch_size: ``--batch-size``.
        helps: what the user can change, best first.

    Raises:
        OutOfResources: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfResources(
            f"memory ran out on {device} with --batch-size {batch_size}{memory_of(device)}; what helps, best "
            f"first: {', '.join(helps)}. What was saved stays"
        ) from error


def own_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: torch.device) -> int:
    """``--num-workers`` where it is not given: processes that read images, by the cores this rank may use.

    A GPU waits for what two processes read. On a CPU readers and the model share the cores.
    """
    cores = own_cores()
    if world_size() > 1:
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        return max(2, min(cores - 1, MOST_WORKERS))
    return min(cores // 4, 2)


def memory_of(device: torch.device) -> str:
    """How much of a device's memory is free, as a part of a message; empty where nobody tells."""
    try:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
        else:
            lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
            free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (RuntimeError, OSError, ValueError, KeyError, IndexError):
        return ""
    return f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free)"


def place(model: M, device: torch.device) -> M:
    """Move to ``device``; on a GPU a frozen ViT keeps its large weights in float16, at half the memory.

    Raises :class:`OutOfResources` where the model does not fit.
    """
    try:
        if device.type == "cuda":
            halve_frozen_vit(model)
        return model.to(device)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfResources(
            f"the model does not fit into the memory of {device}{memory_of(device)}; end what else uses it, "
            "or give another --device"
        ) from error


def rest_vit(model: Any) -> None:
    """Move a frozen vision transformer to the CPU's memory: 2 GB at ViT-g, idle where tokens are cached."""
    model.visual_encoder.to("cpu")
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def halve_frozen_vit(model: Any) -> None:
    """Keep the matrices of a frozen ViT in float16, as LAVIS does; encode_image runs it under autocast."""
    if model.config.freeze_vit:
        for module in model.visual_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.half()
