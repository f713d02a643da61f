"""Which kernel computes each attention: fast ones need a type, a head width and a mask that they know."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sprc.self_check.report import NOTE, OK, Line
from sprc.self_check.setting import Setting, pixels

MATH = "math"  # no kernel: matrix products, and the weights in memory


def check_attention(setting: Setting) -> Iterator[Line]:
    """The vision transformer's and those of the Q-Former's calls, in training."""
    model = setting.placed(setting.model())
    samples = setting.on_device(setting.samples(model.config, setting.shapes.batch))
    images = pixels(model.config, 2).to(setting.device)
    with setting.autocast("auto"):
        with watched_attention() as seen:
            model.vit_tokens(images)
        yield line_of(setting, "attention, ViT", seen)
        text = model.tokenize(samples["text_input"])
        with watched_attention() as seen:
            prompts = model.prompts_of(model.normalise(samples["image"]), text)
        yield line_of(setting, "attention, call 1", seen)
        with watched_attention() as seen:
            model.compose_and_text_features(prompts, text)
        yield line_of(setting, "attention, calls 2 and 4", seen)
        with watched_attention() as seen:
            model.target_features(model.to_be_read(samples["target"]))
        yield line_of(setting, "attention, call 3", seen)


def line_of(setting: Setting, name: str, seen: dict[str, str]) -> Line:
    """What was seen, and a note where a GPU has no kernel for it."""
    figures = "; ".join(f"{what}: {kernel}" for what, kernel in seen.items())
    if setting.on_gpu and MATH in seen.values():
        return Line(
            NOTE,
            name,
            figures,
            "slow and large, though the numbers are right; give --amp bf16 or fp16, or a newer PyTorch",
        )
    return Line(OK, name, figures)


class Kernels(TorchDispatchMode):
    """Writes down which fused attention torch chose."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = MATH

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_scaled_dot_product_"):
            self.chosen = (
                name.removeprefix("_scaled_dot_product_").replace("_attention", "").replace("_", " ")
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_attention() -> Iterator[dict[str, str]]:
    """Within it the dictionary fills with each kind of attention that is computed, and its kernel."""
    seen: dict[str, str] = {}
    compute = F.scaled_dot_product_attention

    def watched(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        with Kernels() as kernels:
            result = compute(query, key, value, attn_mask=attn_mask, **options)
        what = f"{query.shape[1]} heads of {query.shape[3]}, {query.shape[2]} x {key.shape[2]}"
        what += f"{' masked' if attn_mask is not None else ''} {str(result.dtype).removeprefix('torch.')}"
        seen[what] = kernels.chosen
        return result

    F.scaled_dot_product_attention = watched  # type: ignore[assignment]
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = compute
