"""What the fusion module does while it is trained: a row every so many steps, and a warning where it fails.

The loop knows nothing of this. A hook on the module sees its outputs, and the loop calls ``after_backward``
as it would call anything.
"""

import csv
import math
import sys
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sprc.distributed import of_all_ranks, rank
from sprc.files import append_csv, write_csv
from sprc.models.gated_fusion import FusionOutput
from sprc.run_folder import RunFolder
from sprc.training.trackers import Trackers

# A value of the gate this near to 0 or 1 has hardly a gradient left; a gate of them has stopped to choose.
NEAR = 0.05
SATURATED = 0.95


class FusionLog:
    """Writes `fusion_metrics.csv`: gate, delta, change and gradients of one training step each.

    Columns: `step` over the whole run, from 0; `gate_mean`, `gate_std` over tokens and channels, before
    tokens are weighted; `gate_near_0` and `gate_near_1`, the shares below 0.05 and above 0.95; `delta_norm`,
    the mean Euclidean norm of the direction; `alpha`; `mean_change`, mean |fused - image|; `gradient_norm` of
    all the module's parameters, and `gradient_norm_NAME` of each part; empty where it is not finite, as in a
    step that float16's scaler skips. What a strategy does not have has no column. Where a batch is seen in
    parts (several ranks, gradient caching), a value is the mean of the parts' values.

    Args:
        module: the fusion module; a hook is put on it.
        run_folder: where the file goes.
        every: steps between rows.
        step: the run's next step, above 0 for a resumed run; rows from there on are written anew.
        trackers: are told the numbers of each row, if there are any.
        compiled: the module runs under torch.compile, which is not to look into what is measured.
    """

    def __init__(
        self,
        module: nn.Module,
        run_folder: RunFolder | Path,
        every: int,
        step: int = 0,
        trackers: Trackers | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.module, self.every, self.step = module, every, step
        self.file = RunFolder(run_folder).fusion_metrics
        self.trackers = trackers or Trackers()
        self.parts: list[tuple[int, dict[str, Tensor]]] = []  # samples seen at once, and what was seen
        self.warned: set[str] = set()
        if self.file.exists() and rank() == 0:
            with self.file.open(encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            if kept:
                write_csv(self.file, kept)
            else:
                self.file.unlink()
        self.is_due = step % every == 0
        # Hiding it imports the compiler, which takes seconds.
        self.observe = torch.compiler.disable(self.measure) if compiled else self.measure
        module.register_forward_hook(self.observe_if_due)

    def observe_if_due(self, module: nn.Module, inputs: tuple[Tensor, ...], output: FusionOutput) -> None:
        """The hook: :meth:`measure` a step that is due. Validation is not looked at.

        torch.compile sees a flag and not the step's number: one graph serves all steps that are not due.
        """
        if module.training and self.is_due:
            self.observe(module, inputs, output)

    @torch.no_grad()
    def measure(self, module: nn.Module, inputs: tuple[Tensor, ...], output: FusionOutput) -> None:
        """Measure the output of a step."""
        row: dict[str, Tensor] = {}
        if output.gate is not None:
            gate = output.gate.float()
            row["gate_mean"], row["gate_std"] = gate.mean(), gate.std()
            row["gate_near_0"] = (gate < NEAR).float().mean()
            row["gate_near_1"] = (gate > 1 - NEAR).float().mean()
        if output.delta is not None:
            row["delta_norm"] = output.delta.float().norm(dim=-1).mean()
        alpha = getattr(module, "alpha", None)
        if alpha is not None:
            row["alpha"] = alpha.detach().float()
        row["mean_change"] = (output.fused.float() - inputs[0]).abs().mean()
        self.parts.append((len(output.fused), row))

    def after_backward(self) -> None:
        """Add the gradients, write the row if one is due, and count the step."""
        if self.parts:
            whole = sum(samples for samples, _ in self.parts)
            row = {
                name: cast(Tensor, sum(samples / whole * part[name] for samples, part in self.parts))
                for name in self.parts[0][1]
            }
            row["gradient_norm"] = gradient_norm(self.module)
            for name, part in self.module.named_children():
                if any(True for _ in part.parameters()):
                    row[f"gradient_norm_{name}"] = gradient_norm(part)
            means = of_all_ranks(torch.stack([*row.values()])).mean(dim=0).tolist()
            # A step that float16's scaler skips, as its first ones, has no gradient that could be told.
            means = [value if math.isfinite(value) else None for value in means]
            values = dict(zip(row, means, strict=True))
            append_csv(self.file, {"step": self.step, **values})
            numbers = {name: value for name, value in values.items() if value is not None}
            self.trackers.log("fusion", numbers, step=self.step)
            if rank() == 0:
                self.warn(values)
            self.parts = []
        self.step += 1
        self.is_due = self.step % self.every == 0

    def warn(self, values: dict[str, float | None]) -> None:
        """Say once, in plain words, that the gate is saturated or that nothing reaches the module."""
        saturated = (values.get("gate_near_0") or 0.0) + (values.get("gate_near_1") or 0.0)
        if saturated > SATURATED:
            self.once(
                "saturated",
                f"{100 * saturated:.0f} % of the gate's values are within {NEAR} of 0 or 1: it has stopped "
                "choosing and hardly learns any more; try a lower --fusion-lr or --fusion-start identity",
            )
        if values["gradient_norm"] == 0:
            self.once(
                "gradient",
                "the fusion module gets no gradient, so it does not learn; look for an --alpha-init of 0 or "
                "losses whose weights are 0",
            )

    def once(self, kind: str, message: str) -> None:
        """Print ``message`` unless one of its kind was printed before."""
        if kind not in self.warned:
            self.warned.add(kind)
            tqdm.write(f"warning: step {self.step}: {message}", file=sys.stderr)


def gradient_norm(module: nn.Module) -> Tensor:
    """The Euclidean norm of all gradients of a module's parameters; 0 without any."""
    norms = [parameter.grad.float().norm() for parameter in module.parameters() if parameter.grad is not None]
    device = next(module.parameters()).device
    return torch.stack(norms).norm() if norms else torch.zeros((), device=device)
