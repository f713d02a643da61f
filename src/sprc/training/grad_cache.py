"""Gradient caching: batches larger than memory holds, with exact gradients.

Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup. A contrastive loss
needs the whole batch's embeddings, but not the whole batch's graph. So the batch is embedded in chunks whose
graphs are thrown away; the losses give the gradient of each embedding; and each chunk is embedded again, with
the same random numbers, to carry its embeddings' gradients on to the parameters. Memory is one chunk's graph;
the price is one more forward pass of what is trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sprc.errors import InputError

Samples = dict[str, Any]  # tensors and lists, with a row a sample


class Embedder(nn.Module):
    """``model.embed`` as a module's forward, the one method that DistributedDataParallel sees."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Samples) -> dict[str, Tensor]:
        """See ``model.embed``."""
        return cast(Any, self.model).embed(samples)


class GradCache:
    """A batch's losses and gradients, in chunks: :meth:`losses`, backward of these, then :meth:`backward`.

    Args:
        model: ``read_images(samples)`` is what no gradient reaches, done once; ``embed(samples)`` gives a
            dict of tensors, with a row a sample or of no axis; ``losses_of`` makes the losses of these, and
            ``diagnostics`` are scalars that ``embed`` leaves.
        embedder: an :class:`Embedder` of it, or that in DistributedDataParallel, which then exchanges
            gradients once a step, at the last chunk.
        chunk: samples at once.
        mixed_precision: the context in which the model computes.
    """

    def __init__(
        self,
        model: Any,
        embedder: nn.Module,
        chunk: int,
        mixed_precision: Callable[[], AbstractContextManager],
    ) -> None:
        self.model, self.embedder, self.chunk = model, embedder, chunk
        self.mixed_precision = mixed_precision

    def losses(self, samples: Samples) -> dict[str, Tensor]:
        """The losses of the batch; their graph ends at the embeddings."""
        device = self.model.device
        self.chunks: list[Samples] = []
        self.random: list[tuple[Tensor, Tensor | None]] = []
        parts: list[dict[str, Tensor]] = []
        shares: list[float] = []
        diagnostics: list[dict[str, Tensor]] = []
        for chunk in split(samples, self.chunk):
            chunk = self.model.read_images(chunk)
            self.chunks.append(chunk)
            self.random.append(random_state(device))
            # With a graph, which is dropped at once: so both passes run the very same kernels, compiled or
            # not, and draw the same random numbers.
            parts.append({name: value.detach() for name, value in self.model.embed(chunk).items()})
            shares.append(rows_of(chunk) / rows_of(samples))
            diagnostics.append(self.model.diagnostics)
        self.embeddings = {
            name: (torch.cat([part[name] for part in parts]) if value.dim() else value)
            for name, value in parts[0].items()
        }
        for value in self.embeddings.values():
            value.requires_grad_(value.is_floating_point())
        self.model.diagnostics = {
            name: sum(share * part[name] for share, part in zip(shares, diagnostics, strict=True))
            for name in diagnostics[0]
        }
        return self.model.losses_of(self.embeddings)

    def backward(self) -> None:
        """Carry the gradients that the losses gave the embeddings on to the parameters."""
        start, last = 0, len(self.chunks) - 1
        for number, (chunk, state) in enumerate(zip(self.chunks, self.random, strict=True)):
            set_random_state(state, self.model.device)
            end = start + rows_of(chunk)
            is_last = number == last
            apart = isinstance(self.embedder, DistributedDataParallel) and not is_last
            with cast(Any, self.embedder).no_sync() if apart else nullcontext():
                with self.mixed_precision():
                    embeddings = self.embedder(chunk)
                pairs = []
                for name, value in embeddings.items():
                    grad = self.embeddings[name].grad
                    if grad is None or not value.requires_grad:
                        continue  # a number that is no feature, or what does not learn
                    if not (value.dim() or is_last):
                        continue  # a scalar is the same in all chunks, and its gradient is passed on once
                    pairs.append((value, grad[start:end] if value.dim() else grad))
                values, grads = zip(*pairs, strict=True)
                torch.autograd.backward(values, grads)
            start = end
        self.chunks, self.random, self.embeddings = [], [], {}


def rows_of(samples: Samples) -> int:
    """How many samples there are."""
    return len(next(iter(samples.values())))


def split(samples: Samples, size: int) -> list[Samples]:
    """The samples in parts of ``size``, the last of what is left."""
    return [
        {name: values[start : start + size] for name, values in samples.items()}
        for start in range(0, rows_of(samples), size)
    ]


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The CPU's random numbers' state, and that of ``device`` where it is a GPU.

    Raises :class:`InputError` for a device of another kind: the second pass would draw other dropout.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--grad-cache works on cpu and cuda, and the model is on {device}; move it there")
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put back what :func:`random_state` gave."""
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
