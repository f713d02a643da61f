"""Which batch fits into which GPU: the peak memory of a training step, estimated without a GPU.

    python benchmarks/memory.py
prints the largest batch for a card, the peak by batch, and the peak of a re-ranker's step. What is added up
is in estimate.py. Two or three batch sizes of a line are estimated; between and beyond them memory grows
evenly. ``run.py --only memory`` holds estimates against measurements.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from estimate import captions_of, use_of_steps
from measure import PROCESSES, Memory, Row, Settings, in_bytes, peak_memory, require_memory, within
from steps import SMALL, make_model, make_samples
from torch import nn
from tqdm import tqdm

from sprc.config import BACKBONES, ModelConfig, read_backbone
from sprc.models.device import precision
from sprc.processes import own_cores
from sprc.self_check.speed import take_step
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.loop import make_optimizer

BATCHES = (16, 32, 64, 128, 256, 512)
LARGEST = 1024  # a batch that is estimated; beyond it nothing is said
CARDS = (16, 24, 40, 80)  # GB
CHUNK = 16  # of --grad-cache
NEGATIVES = (4, 8, 16)  # a query's, of a re-ranker


class Line(NamedTuple):
    """A line of a table."""

    backbone: str
    cached: bool
    fusion: bool
    chunk: int  # of --grad-cache, or 0
    negatives: int = 0  # a re-ranker's; 0 is SPRC's own step

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        values = read_backbone(self.backbone)["model"]
        return ModelConfig(**{**values, "use_gated_fusion": self.fusion})

    @property
    def estimated(self) -> tuple[int, ...]:
        """The batch sizes that are estimated. From the second chunk on, each adds the same."""
        if self.chunk:
            return 2 * self.chunk, 3 * self.chunk
        return (16, 64) if self.negatives else (16, 128, LARGEST)

    def estimate(self) -> dict[int, int]:
        """Peak bytes at these."""
        use = use_of_steps(
            self.config, self.estimated, self.chunk, cached=self.cached, negatives=self.negatives
        )
        return {batch: found.most for batch, found in use.items()}


Estimates = dict[Line, dict[int, int]]


def peak_at(batch: int, known: dict[int, int]) -> float:
    """GB at ``batch``, on the straight line through the two of the known ones that are nearest."""
    pairs = list(pairwise(sorted(known.items())))
    (low, least), (high, most) = next((pair for pair in pairs if batch <= pair[1][0]), pairs[-1])
    return (least + (most - least) * (batch - low) / (high - low)) / 1e9


def largest_batch(card: float, known: dict[int, int], step: int) -> int:
    """The largest multiple of ``step`` up to LARGEST that fits: a GB and a tenth of ``card`` GB are left."""
    sizes = range(step, LARGEST + 1, step)
    return max((size for size in sizes if peak_at(size, known) <= 0.9 * card - 1), default=0)


def step_lines() -> list[Line]:
    """Those of SPRC's own step; of `tiny`, which fits anywhere, one."""
    return [
        Line(backbone, cached, fusion, chunk)
        for backbone in BACKBONES
        for cached in (False, True)
        for fusion, chunk in ((True, 0), (False, 0), (True, CHUNK))
        if backbone != "tiny" or (fusion and not cached and not chunk)
    ]


def reranker_lines() -> list[Line]:
    """Those of a re-ranker's step, one for each number of negatives."""
    return [
        Line(backbone, True, False, chunk, negatives)
        for backbone in ("pretrain", "pretrain_vitL")
        for chunk in (0, 8, 4)
        for negatives in NEGATIVES
    ]


def estimate_all(lines: list[Line]) -> Estimates:
    """Estimate on all cores, those that take longest first, with a bar on stderr."""
    found = {}
    work = sorted(lines, key=lambda line: line.chunk, reverse=True)
    with ProcessPoolExecutor(own_cores(), mp_context=PROCESSES) as pool:
        jobs = {pool.submit(Line.estimate, line): line for line in work}
        for job in tqdm(as_completed(jobs), "Estimating", len(jobs), file=sys.stderr):
            found[jobs[job]] = job.result()
    return found


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def named(line: Line) -> list[str]:
    """What a line of SPRC's step begins with."""
    where = "the cache" if line.cached else "pixels"
    return [line.backbone, where, "on" if line.fusion else "off", str(line.chunk or "none")]


def print_steps(estimates: Estimates) -> None:
    """Print the largest batches by card, and the peaks by batch."""
    head = ["backbone", "images from", "fusion", "--grad-cache"]
    fits, peaks = [], []
    for line in step_lines():
        known = estimates[line]
        largest = [largest_batch(card, known, line.chunk or 8) for card in CARDS]
        told = {0: "-", LARGEST: f"{LARGEST}+"}
        fits.append(named(line) + [told.get(batch, str(batch)) for batch in largest])
        sizes = {batch: peak_at(batch, known) for batch in BATCHES if batch > line.chunk}
        figures = {batch: f"{size:.{1 if size >= 1 else 2}f}" for batch, size in sizes.items()}
        peaks.append(named(line) + [figures.get(batch, "") for batch in BATCHES])
    print_table(head + [f"{card} GB" for card in CARDS], fits)
    print_table(head + [f"batch {batch}" for batch in BATCHES], peaks)


def print_rerankers(estimates: Estimates) -> None:
    """Print the peaks of a re-ranker by its negatives."""
    rows = []
    for backbone in ("pretrain", "pretrain_vitL"):
        for batch, chunk in ((16, 0), (16, 8), (16, 4), (64, 0), (64, 8)):
            known = [estimates[Line(backbone, True, False, chunk, count)] for count in NEGATIVES]
            figures = [f"{peak_at(batch, estimate):.1f}" for estimate in known]
            rows.append([backbone, str(batch), str(chunk or "none"), *figures])
    head = ["backbone", "batch", "--grad-cache", *(f"{count} negatives" for count in NEGATIVES)]
    print_table(head, rows)


# --- against a measurement: rows of run.py


class Trial(NamedTuple):
    """A step that is estimated and measured; on a GPU batch and chunk are eight times as large."""

    title: str
    backbone: str
    cached: bool
    batch: int
    chunk: int = 0
    changes: dict[str, Any] = {}  # noqa: RUF012 (read only)


TRIALS = (
    Trial("ViT-g, from the cache, fusion on", "pretrain", True, 4),
    Trial("ViT-g, from the cache, fusion off", "pretrain", True, 4, changes={"use_gated_fusion": False}),
    Trial("ViT-g, from the cache, fusion on, --grad-cache 4", "pretrain", True, 8, 4),
    Trial("ViT-g's first two blocks, from pixels, fusion on", "pretrain", False, 4, changes={"vit_depth": 2}),
    Trial("ViT-L, from the cache, fusion on", "pretrain_vitL", True, 4),
    Trial("tiny, from pixels, fusion on", "tiny", False, 256),
    Trial("tiny, from the cache, fusion on, --grad-cache 64", "tiny", True, 128, 64),
)


def prepare(config: ModelConfig, batch: int, chunk: int, device: str, cached: bool) -> Callable[[], None]:
    """A step of training, the optimizer's included, ready to run; its gradients are dropped."""
    model = make_model(config, device, with_vit=not cached)
    samples = make_samples(config, batch, device) | {"text_input": captions_of(batch, chunk)}
    if cached:
        model.visual_encoder = nn.Identity()
    else:
        size = (batch, 3, config.image_size, config.image_size)
        samples |= {name: torch.randn(size, device=device) for name in ("image", "target")}
    optimizer = make_optimizer(model, 1e-9)
    amp = precision("auto", torch.device(device))
    mixed_precision = partial(torch.autocast, device, amp, enabled=amp is not None)

    def step() -> None:
        cache = GradCache(model, Embedder(model), chunk, mixed_precision) if chunk else None
        take_step(model, optimizer, samples, cache, mixed_precision)
        optimizer.zero_grad(set_to_none=True)

    return step


def check(settings: Settings) -> list[Row]:
    """Estimated over measured peak memory of a step: above what was there before it, and in all."""
    require_memory(1 if settings.quick else 8)
    device = settings.device
    libraries = 0  # on a GPU torch's own count has none
    if device == "cpu":
        libraries = peak_memory(prepare, ModelConfig(**SMALL), 2, 0, device, True, device=device).whole
    trials = TRIALS[-1:] if settings.quick else TRIALS
    return [against_measured(trial, device, libraries) for trial in trials]


def against_measured(trial: Trial, device: str, libraries: int) -> Row:
    """The row of one step; ``libraries`` are the bytes of a process that holds little else."""
    config = ModelConfig(**{**read_backbone(trial.backbone)["model"], **trial.changes})
    times = 8 if device == "cuda" else 1
    batch, chunk = times * trial.batch, times * trial.chunk
    use = use_of_steps(config, [batch], chunk, device, cached=trial.cached)[batch]
    estimated = Memory(use.most - use.before, use.most)
    found = peak_memory(prepare, config, batch, chunk, device, trial.cached, device=device)
    measured = Memory(found.extra, max(found.whole - libraries, 1))
    extra, whole = (ours / max(theirs, 1) for ours, theirs in zip(estimated, measured, strict=True))
    detail = (
        f"{in_bytes(estimated.extra)} against {in_bytes(measured.extra)} above what was there before; "
        f"in all {whole:.3f} x, {in_bytes(estimated.whole)} against {in_bytes(measured.whole)}"
    )
    name = f"peak memory of a step, estimated / measured: {trial.title}, B {batch}"
    return Row(name, "0.9 to 1.1 x", f"{extra:.3f} x", detail, within(extra, 0.9, 1.1))


def main() -> None:
    """Print the tables."""
    estimates = estimate_all(step_lines() + reranker_lines())
    print_steps(estimates)
    print_rerankers(estimates)


if __name__ == "__main__":
    main()
