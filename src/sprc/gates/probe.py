"""What of the fusion's edit does a trained model use? Recall with the edit changed, at scoring alone.

    as trained           fused
    none                 image: what the model has learned to do without the text's edit
    same for all tokens  image + mean over tokens of (fused - image): no choice of place is left
    another caption's    the edit of the query before; the Q-Former still reads the query's own caption

The model's weights stay as they are. So "none" is not plain SPRC, which has learned to do without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from tqdm import tqdm

from sprc.models.gated_fusion import FusionOutput
from sprc.scoring.encoding import Split
from sprc.scoring.recall import metrics, rank_split
from sprc.scoring.scorer import Scorer

EDITS = ("as trained", "none", "same for all tokens", "another caption's")


@contextmanager
def changed_edit(module: nn.Module, edit: str) -> Iterator[None]:
    """Within it the fusion ``module`` makes the edit ``edit``, one of ``EDITS``."""
    if edit == "another caption's":
        handle = module.register_forward_pre_hook(caption_before())
    else:
        handle = module.register_forward_hook(lambda _, inputs, output: _change(edit, inputs[0], output))
    try:
        yield
    finally:
        handle.remove()


def _change(edit: str, image_embeds: Tensor, output: FusionOutput) -> FusionOutput:
    if edit == "none":
        return output._replace(fused=image_embeds)
    if edit == "same for all tokens":
        step = (output.fused - image_embeds).mean(dim=1, keepdim=True)
        return output._replace(fused=image_embeds + step)
    return output


def caption_before() -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that gives each query the text of the one before it, the first one that of its batch's last."""
    before: list[Tensor] = []

    def shift(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image_embeds, *texts = inputs  # (B, N, D); words (B, M, Dt) and their mask (B, M)
        lasts = [text[-1:] for text in texts]
        earlier = before.copy() or lasts
        before[:] = lasts
        rows = zip(earlier, texts, strict=True)
        return image_embeds, *(joined(first, text[:-1]) for first, text in rows)

    return shift


def joined(first: Tensor, second: Tensor) -> Tensor:
    """(A, K, ...) and (B, M, ...) to (A + B, max(K, M), ...), the shorter texts filled up with zeros."""
    out = first.new_zeros(len(first) + len(second), max(first.shape[1], second.shape[1]), *first.shape[2:])
    out[: len(first), : first.shape[1]] = first
    out[len(first) :, : second.shape[1]] = second
    return out


def probe(scorer: Scorer, split: Split) -> list[dict[str, Any]]:
    """A row for each of ``EDITS``: the benchmark's metrics of ``split``, in percent.

    ``scorer`` holds a model with fusion; every triplet of ``split`` has a target.
    """
    rows = []
    for edit in tqdm(EDITS, desc="edits", unit="edit"):
        with changed_edit(cast(nn.Module, scorer.checkpoint.model.gated_fusion), edit):
            (encoded,) = scorer.encode([split])
        rows.append({"edit": edit, **metrics([split], [rank_split(split, encoded)])})
    return rows
