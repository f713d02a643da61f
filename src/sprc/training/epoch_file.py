"""A tensor that training makes at the start of some epochs, on disk: a run that goes on needs the same."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sprc.distributed import rank, wait_for_all
from sprc.errors import InputError
from sprc.files import write_atomically

NAME = "values"


class EpochFile:
    """One tensor in a safetensors file, the epoch that it was made for, and a checksum.

    Args:
        path: of the file.
        flag: the flag that asks for what is in it, for messages.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self.path, self.flag = path, flag

    def write(self, epoch: int, values: Tensor) -> None:
        """Put ``values``, made for ``epoch``, in the file's place. All ranks call it; rank 0 writes."""
        from safetensors.torch import save

        if rank() == 0:
            values = values.cpu().contiguous()
            told = {"epoch": str(epoch), "digest": digest_of(values)}
            contents = save({NAME: values}, metadata=told)
            write_atomically(self.path, lambda file: file.write(contents))
        wait_for_all()

    def read(self, epoch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What was made for ``epoch``, on the CPU.

        Raises:
            InputError: the file is not there, broken, or holds something else than asked for.
        """
        from safetensors import SafetensorError, safe_open

        again = f"restore it from a copy, or start a new run ({self.flag} needs it)"
        if not self.path.exists():
            raise InputError(f"{self.path} is missing; {again}")
        try:
            with safe_open(self.path, framework="pt") as file:
                told = file.metadata() or {}
                values: Tensor = file.get_tensor(NAME).clone()  # what is mapped would go with the file
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} cannot be read: it is empty or damaged; {again}") from error
        if told.get("digest") != digest_of(values):
            raise InputError(f"{self.path} is damaged: its checksum is another; {again}")
        if (values.shape, values.dtype) != (shape, dtype):
            raise InputError(
                f"{self.path} holds {tuple(values.shape)} values of {values.dtype}, and this run needs "
                f"{shape} of {dtype}; {again}"
            )
        if told.get("epoch") != str(epoch):
            raise InputError(
                f"{self.path} is of epoch {told.get('epoch')}, and the run goes on with that of epoch "
                f"{epoch}; {again}"
            )
        return values


def digest_of(values: Tensor) -> str:
    """A hash of the values' bytes."""
    return hashlib.blake2b(values.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
