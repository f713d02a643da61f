"""The device's numbers against a CPU's in float64 or float32: the vision transformer, losses, gradients."""

import math
import sys
from collections.abc import Iterator, Sized
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sprc.config import AMP
from sprc.models.device import place
from sprc.models.gated_fusion import FUSION_STRATEGIES
from sprc.self_check.report import FAIL, OK, Line, bounded
from sprc.self_check.setting import (
    Model,
    Samples,
    Setting,
    distance,
    fill_vit,
    pixels,
    take_gradients,
    weighted,
)

# Half of the last digit: what rounding a value to the type changes, at most and relative.
ROUNDOFF = {"off": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
OTHER_WHEEL = "install another PyTorch wheel or driver, and report it with the card's name"
# Of a whole gradient, and of the losses. A matrix product takes a rounded input and gives a rounded output,
# and a few dozen of these lie on a path; independent ones add like the root of their number.
BOUND = {"off": 1e-4, "bf16": 16 * ROUNDOFF["bf16"], "fp16": 16 * ROUNDOFF["fp16"]}
BECAUSE = {
    "off": "another order of sums; TF32 would be 1e-3",
    "bf16": "16 roundings of 2^-8",
    "fp16": "16 roundings of 2^-11",
}
REMEDY = {
    "off": f"unset what allows TF32 (NVIDIA_TF32_OVERRIDE); else {OTHER_WHEEL}",
    "bf16": f"train with --amp fp16 or off; {OTHER_WHEEL}",
    "fp16": f"train with --amp bf16 or off; {OTHER_WHEEL}",
}
# A part of few numbers meets fewer chances to cancel; one that is lost or turned would be at 1 or above.
OF_A_PART = 8


@torch.no_grad()
def check_vit(setting: Setting) -> Iterator[Line]:
    """The frozen vision transformer as training runs it, and whether a batch changes an image's tokens."""
    config = setting.shapes.vit
    model = setting.model(**{**config, "vit_depth": 1}, initializer_range=0.02)
    fill_vit(model, config["vit_depth"])
    images = pixels(model.config, 8)
    vit = model.visual_encoder
    # A CPU's float32 is exact enough for a GPU's float16; for its own float32 it is not.
    exact = vit(images[:1]) if setting.on_gpu else deepcopy(vit).double()(images[:1].double())
    depth = len(cast(Sized, vit.blocks))
    on_device = place(model, setting.device)
    # The tokens themselves stay float32: what is rounded, about 4 times each, are a block's two branches.
    unit, told = (ROUNDOFF["fp16"], "2^-11") if setting.on_gpu else (64 * ROUNDOFF["off"], "2^-18")
    because = f"{depth} blocks of 8 roundings of {told}, adding like a root"
    bound = (8 * depth) ** 0.5 * unit
    remedy = f"do not train from these tokens; {OTHER_WHEEL}"
    alone = on_device.vit_tokens(images[:1].to(setting.device))
    among = on_device.vit_tokens(images.to(setting.device))[:1]
    against = "float32 on the CPU" if setting.on_gpu else "float64"
    what = f"{depth} blocks against {against}: off by"
    yield bounded("vit", what, apart(alone, exact), bound, because, remedy)
    # Both are off by as much, in another direction each.
    yield bounded(
        "vit, batch of 1 and of 8",
        "one image's tokens are apart by",
        apart(among, alone),
        2**0.5 * bound,
        "another kernel, the same roundings" if setting.on_gpu else "the same roundings",
        remedy,
    )


def apart(tokens: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the second, on the CPU in float64."""
    tokens, exact = tokens.cpu().double(), exact.cpu().double()
    return float((tokens - exact).norm() / exact.norm())


class Exact(NamedTuple):
    """What a CPU in float64 makes of a batch."""

    embeddings: dict[str, Tensor]
    losses: dict[str, float]
    upstream: dict[str, Tensor]  # gradients of the total loss by the embeddings
    gradients: dict[str, Tensor]  # and by the parameters


def exact_of(model: Model, samples: Samples) -> Exact:
    """In float64; the model itself stays as it is."""
    model = deepcopy(model).double()
    embeddings = model.embed(samples)
    for value in embeddings.values():
        value.retain_grad()
    losses = model.losses_of(embeddings)
    weighted(losses).backward()
    return Exact(
        {name: value.detach() for name, value in embeddings.items()},
        {name: loss.item() for name, loss in losses.items()},
        {name: gradient_of(value) for name, value in embeddings.items()},
        take_gradients(model),
    )


def gradient_of(value: Tensor) -> Tensor:
    """Of a value that has one."""
    return cast(Tensor, value.grad)


def check_gradients(setting: Setting) -> Iterator[Line]:
    """Losses and gradients of plain SPRC and of each fusion, in each precision, against float64 on the CPU.

    The embeddings' gradients, by the losses, are taken apart from the parameters', by the embeddings. For the
    losses take the largest of a target's similarities: where rounding makes another one the largest, the
    gradients jump, which says nothing about the device. For the same reason all tokens are selected. At the
    identity start most of a fusion would have no gradient.
    """
    worst: dict[str, dict[str, tuple[float, str]]] = {amp: {} for amp in AMP if amp != "auto"}
    for fusion in ("off", *FUSION_STRATEGIES):
        switches = {"use_gated_fusion": False} if fusion == "off" else {"fusion_strategy": fusion}
        told: dict[str, Any] = {"fusion_start": "random", "fusion_top_k": sys.maxsize, "fusion_dropout": 0.0}
        model = setting.model(dropout=0.0, **told, **switches)
        samples = setting.samples(model.config, setting.shapes.batch)
        exact = exact_of(model, samples)
        on_device, samples = setting.placed(model), setting.on_device(samples)
        for amp, found in worst.items():
            for what, (error, of) in errors_of(setting, on_device, samples, amp, exact).items():
                if not error <= found.get(what, (0.0, ""))[0]:  # a NaN is the worst
                    found[what] = (error, f"fusion {fusion}{of}")
    for amp, found in worst.items():
        yield line_of(amp, found)


def errors_of(
    setting: Setting, model: Model, samples: Samples, amp: str, exact: Exact
) -> dict[str, tuple[float, str]]:
    """How far losses and gradients are off, and of what."""
    scale = 2.0**16 if amp == "fp16" else 1.0  # where torch's scaler starts
    while True:
        with setting.autocast(amp):
            embeddings = model.embed(samples)
            losses = model.losses_of(embeddings)
        grads = [scale * exact.upstream[name].to(value) for name, value in embeddings.items()]
        torch.autograd.backward(list(embeddings.values()), grads)
        found = take_gradients(model, scale)
        if scale <= 1 or all(value.isfinite().all() for value in found.values()):
            break
        scale /= 2  # as the scaler does
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - set(exact.gradients) | trained - set(found)):
        return {"parts": (math.inf, f": {missing[0]} gets no gradient")}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in exact.gradients.items():
        part = name if value.dim() == 0 else name.split(".")[0]
        parts.setdefault(part, {})[name] = value
    of_parts = {part: distance(found, values) for part, values in parts.items()}
    part = max(of_parts, key=lambda name: of_parts[name])
    loss = max(abs(losses[name].item() / value - 1) for name, value in exact.losses.items())
    errors = {"losses": (loss, ""), "gradient": (distance(found, exact.gradients), "")}
    if amp == "off":  # the losses are float32 in every precision
        errors["losses' gradient"] = (distance(upstream_of(setting, model, exact), exact.upstream), "")
    return errors | {"parts": (of_parts[part], f", {part}")}


def upstream_of(setting: Setting, model: Model, exact: Exact) -> dict[str, Tensor]:
    """The losses' gradients by the exact embeddings."""
    leaves = {
        name: value.float().to(setting.device).requires_grad_() for name, value in exact.embeddings.items()
    }
    weighted(model.losses_of(leaves)).backward()
    return {name: gradient_of(value).cpu().double() for name, value in leaves.items()}


def line_of(amp: str, found: dict[str, tuple[float, str]]) -> Line:
    """One precision's line: the worst of all strategies."""
    bounds = dict.fromkeys(found, BOUND[amp]) | {"parts": OF_A_PART * BOUND[amp]}
    told = ", ".join(f"{what} {error:.1e} ({of})" for what, (error, of) in found.items())
    name = f"gradients, {'float32' if amp == 'off' else amp}"
    figures = f"off by: {told}; bounds {BOUND[amp]:.1e} and {bounds['parts']:.1e} a part ({BECAUSE[amp]})"
    passed = all(error <= bounds[what] for what, (error, _) in found.items())
    return Line(OK, name, figures) if passed else Line(FAIL, name, figures, REMEDY[amp])
