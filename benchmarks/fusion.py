"""Our fusion module against the formula as it is written, with the same weights."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from measure import Row, Settings, memory_row, peak_memory, ratio_row, require_memory, side_by_side
from torch import Tensor

from sprc.models.gated_fusion import GatedFusionModule

WORDS = 32
TEXT_WIDTH = 768
TOKENS = 257


def naive_fusion(module: GatedFusionModule, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """fused = I + alpha * sigmoid(MLP_g([I ; t])) * tanh(MLP_d(t)), word for word: 5 N D^2.

    The text's row t is repeated for the N tokens, both for the 2 D wide concatenation and for delta.
    Shapes: image (B, N, D), text (B, M, Dt), mask (B, M); to (B, N, D).
    """
    weights = mask[:, :, None].to(text.dtype)
    pooled = (text * weights).sum(dim=1) / weights.sum(dim=1)  # (B, Dt)
    t = module.text_proj(pooled)[:, None].expand_as(image)  # (B, N, D)
    gate = torch.sigmoid(module.gate_mlp(torch.cat([image, t], dim=-1)))
    delta = torch.tanh(module.delta_mlp(t))
    return image + module.alpha * gate * delta


def our_fusion(module: GatedFusionModule, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """The module as the model calls it."""
    return module(image, text, mask).fused


SIDES = {"ours": our_fusion, "naive": naive_fusion}


def make_inputs(batch: int, width: int, quick: bool, device: str) -> tuple[GatedFusionModule, list[Tensor]]:
    """A module and [image, text, mask, the gradient from above], the same for a seed."""
    torch.manual_seed(0)
    text_width, tokens = (24, 10) if quick else (TEXT_WIDTH, TOKENS)
    module = GatedFusionModule(width, text_width).to(device)
    image = torch.randn(batch, tokens, width, device=device, requires_grad=True)
    text = torch.randn(batch, WORDS, text_width, device=device, requires_grad=True)
    lengths = torch.randint(4, 25, (batch,), device=device)
    mask = torch.arange(WORDS, device=device) < lengths[:, None]
    return module, [image, text, mask, torch.randn_like(image)]


def step(side: str, module: GatedFusionModule, inputs: list[Tensor]) -> None:
    """Forward and backward; gradients are thrown away, so that each step makes them anew."""
    *arguments, upstream = inputs
    SIDES[side](module, *arguments).backward(upstream)
    module.zero_grad(set_to_none=True)
    for value in arguments[:2]:
        value.grad = None


def prepare(side: str, batch: int, width: int, quick: bool, device: str) -> Callable[[], None]:
    """One step of one side, ready to run."""
    return partial(step, side, *make_inputs(batch, width, quick, device))


def assert_equal(module: GatedFusionModule, inputs: list[Tensor]) -> None:
    """Both sides give the same values and gradients.

    In float64: alpha's gradient is a sum of millions of terms that nearly cancel, and rounding it to float32
    would hide what is looked for.
    """
    module = copy.deepcopy(module).double()
    inputs = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    *arguments, upstream = inputs
    found = {}
    module.eval()
    for side, compute in SIDES.items():
        wanted = [*arguments[:2], *module.parameters()]
        fused = compute(module, *arguments)
        found[side] = [fused, *torch.autograd.grad(fused, wanted, upstream)]
    for ours, naive in zip(found["ours"], found["naive"], strict=True):
        error = (ours - naive).abs().max() / naive.abs().max().clamp(min=1e-6)
        assert error < 1e-9, f"our fusion differs from the formula by {error:.1e} of the largest value"


def run(settings: Settings, batch: int, width: int) -> list[Row]:
    """Time and peak memory at one shape, in train mode with dropout."""
    device = settings.device
    require_memory(0.5 if settings.quick else 1 + 40 * 4e-9 * batch * TOKENS * width)
    assert_equal(*make_inputs(min(batch, 4), width, settings.quick, device))
    module, inputs = make_inputs(batch, width, settings.quick, device)
    times = side_by_side({side: partial(step, side, module, inputs) for side in SIDES}, settings)
    del module, inputs
    peaks = {
        side: peak_memory(prepare, side, batch, width, settings.quick, device, device=device)
        for side in SIDES
    }
    name = f"fusion, naive formula / ours, B {batch}, D {width}"
    return [
        ratio_row(f"{name}: time", "2 x or more", times["naive"], times["ours"], least=2),
        memory_row(
            f"fusion, ours / naive formula, B {batch}, D {width}: peak memory",
            "0.6 x or less",
            peaks["ours"],
            peaks["naive"],
            0.6,
        ),
    ]
