"""What ``--compile`` needs of the machine, and what its failures are told as."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sprc.errors import InputError


def require_compiler(device: torch.device) -> None:
    """Raise :class:`InputError` unless what torch.compile calls on ``device`` is there."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile needs the package triton on a GPU: pip install triton, or leave it out")
    variable, names = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if sys.platform == "win32":
        names = ("cl",)
    given = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([given] if given else names)):
        missing = f"{variable}={given} is none" if given else f"{' or '.join(names)} is not in PATH"
        raise InputError(
            f"--compile needs a compiler, and {missing}; install one (Debian: apt-get install g++), name "
            f"yours in {variable}, or leave the flag out"
        )


@contextmanager
def told_compile_errors() -> Iterator[None]:
    """Tell what torch.compile could not build in here as one :class:`InputError`."""
    try:
        yield
    except RuntimeError as error:
        # Its classes are in modules that take long to import, and are imported if it was used.
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        reason = " ".join(lines[: 1 + lines[0].endswith(":")])
        raise InputError(f"--compile: torch.compile failed ({reason}); leave the flag out") from error
