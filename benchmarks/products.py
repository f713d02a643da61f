"""A step's matrix products alone: what no better code around them can go below.

The step runs once, and each product's shape is noted. Then as many products of the same shapes, on numbers of
their own, are what the step is measured against.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
KINDS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class Operand(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def made(self) -> Tensor:
        """A tensor of random numbers that lies like it; an expanded one as well."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        numbers = torch.empty(last + 1, dtype=self.dtype, device=self.device).normal_()
        return numbers.as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):
    """Notes the matrix products that are made within it, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, tuple[Operand, ...]]] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation, and note it if it is a product of something."""
        result = func(*args, **(kwargs or {}))
        if func in KINDS and result.numel():
            operands = tuple(Operand.of(x) for x in tree_leaves(args) if isinstance(x, Tensor))
            self.counts[func, operands] += 1
        return result

    @property
    def flop(self) -> int:
        """Floating point operations of all of them: a multiplication and an addition are two."""
        total = 0
        for (_, (*_, left, right)), count in self.counts.items():
            batch = left.shape[0] if len(left.shape) == 3 else 1
            total += count * 2 * batch * left.shape[-2] * left.shape[-1] * right.shape[-1]
        return total

    def alone(self) -> Callable[[], None]:
        """The same products and nothing else, ready to run."""
        known: dict[Operand, Tensor] = {}
        calls = []
        for (func, operands), count in self.counts.items():
            tensors = [known.setdefault(operand, operand.made()) for operand in operands]
            calls.append((func, tensors, count))

        def run() -> None:
            for func, tensors, count in calls:
                for _ in range(count):
                    func(*tensors)

        return run


def products_of(step: Callable[[], object]) -> Products:
    """The products of one step."""
    with Products() as products:
        step()
    return products
