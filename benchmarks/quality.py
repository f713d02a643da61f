"""Time to quality: how long each way trains until it scores on validation what plain SPRC does at its best.

`tiny` from its pre-trained weights, on the built-in data, with the flags of `make demo`, by the trainer that
users run. A process of its own for each training. The full figure, on a machine that does nothing else:

    python benchmarks/quality.py --seeds 0 1 2 --epochs 6
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from measure import Row, Settings, in_fresh_process, not_measured
from published import HAS_LAVIS, NO_LAVIS, LavisStep
from torch import Tensor, nn

from sprc.data.images import Loader
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.splits import SyntheticConfig
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Samples
from sprc.models.device import place, start_device
from sprc.scoring.benchmarks import CIRR
from sprc.scoring.encoding import encode_split
from sprc.scoring.feature_cache import open_images
from sprc.scoring.recall import rank_split
from sprc.training import fine_tuning
from sprc.training.settings import default_flags
from sprc.training.start import start

# Of `make demo`, but for what a way changes, the seed and the epochs.
FLAGS: dict[str, Any] = {
    "dataset": "cirr",
    "backbone": "tiny",
    "cache_dtype": "float32",
    "batch_size": 64,
    "learning_rate": 5e-4,
    "num_workers": 0,
    "use_gated_fusion": False,
}
# Points from plain SPRC's best down to the line. Of two trainings that do the same arithmetic, rounding would
# make one miss the other's best by a query, which is 0.1.
SLACK = 0.5


class Way(NamedTuple):
    """How a model is trained."""

    title: str
    flags: dict[str, Any]  # beside FLAGS
    published: bool = False  # from image files, on LAVIS's classes; else from a feature cache


WAYS = {
    # Its own --num-workers: on two cores it is faster than with none.
    "plain": Way("plain SPRC as published", {"num_workers": 2}, published=True),
    "off": Way("ours, fusion off", {}),
    "gated": Way("ours, gated fusion", {"use_gated_fusion": True}),
    "bank": Way("ours, fusion off, --negatives bank", {"negatives": "bank"}),
    "mined": Way("ours, fusion off, --negatives mined", {"negatives": "mined"}),
}


class Curve(NamedTuple):
    """What one training gave after each of its epochs."""

    seconds: list[float]  # from its start, without validations
    quality: list[float]  # mean(R@5+R_s@1) on validation, in percent
    test: list[float]  # the same on the test split
    losses: list[float]  # the mean of the epoch's steps
    filling: float = 0.0  # seconds of the feature cache's filling, which are in ``seconds``
    validation: float = 0.0  # seconds of all validations, which are not


class PublishedStep(nn.Module):
    """Plain SPRC's step from pixels, which learns the parameters of ``model``: an objective for the trainer.

    References and targets pass the vision transformer one after the other, and the four calls run on LAVIS's
    classes, with captions padded to all their 32 tokens. The vision transformer itself is ours.
    """

    def __init__(self, model: Blip2QformerCirAlignPrompt) -> None:
        super().__init__()
        self.model = model
        self.step = LavisStep(model)
        self.bert = self.step.bert
        # LavisStep shares the memory alone. Here gradients have to reach what the optimizer holds, too.
        for name, parameter in model.Qformer.bert.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(self.bert.get_submodule(owner), leaf, parameter)

    def forward(self, samples: Samples) -> dict[str, Tensor]:
        """SPRC's losses of (B, 3, S, S) `image` and `target`, and B captions `text_input`."""
        images = {name: self.encode(samples[name]) for name in ("image", "target")}
        return self.step({**samples, **images})

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, N, D): the whole batch at once, which on a CPU vit_tokens does not do."""
        on_gpu = pixels.device.type == "cuda"
        return self.model.vit_tokens(pixels) if on_gpu else self.model.visual_encoder(pixels)


def train(way: Way, data: Path, epochs: int, seed: int, device_name: str) -> Curve:
    """Train once and score the validation and the test split after each epoch. What is printed is hidden.

    The clock starts when the model is there. It stands still while splits are scored. Plain SPRC does not
    look at the images ahead of the training, so for it that is not counted either.

    Args:
        way: what is trained.
        data: the folder of the built-in data; runs and caches go there as well.
        epochs: how many.
        seed: of data order, weights and dropout.
        device_name: "cpu" or "cuda".
    """
    with (
        tempfile.TemporaryDirectory(dir=data) as folder,
        (Path(folder) / "log.txt").open("w") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        given = {**FLAGS, **way.flags, "data_path": data, "models_path": Path(folder), "seed": seed}
        given |= {"num_epochs": epochs, "device": device_name}
        if not way.published:
            given["feature_cache"] = Path(folder) / "features"
        return run_training(way, given)


def train_apart(*arguments: Any) -> Curve:
    """:func:`train` in a process of :func:`in_fresh_process`, which is to fork its readers as scripts do.

    A fork server's would first import what they need, and plain SPRC's training would wait for it.
    """
    multiprocessing.set_start_method("fork", force=True)
    return train(*arguments)


def run_training(way: Way, given: dict[str, Any]) -> Curve:
    """The steps of :func:`sprc.training.fine_tuning.fine_tune`, with a clock and an objective of its own."""
    settings, _ = fine_tuning.read_settings(default_flags(), given)
    device = start_device(settings.device, settings.amp)
    settings = fine_tuning.complete(settings, device)
    data, config = fine_tuning.read_data(settings, device, None)
    begin = start(settings, config, None)
    model = begin.model
    assert isinstance(model, Blip2QformerCirAlignPrompt)
    place(model, device)
    test = CIRR.load(settings.data_path, None, "test1")
    test_images = open_cached(model, test, settings.data_path)

    opened = time.perf_counter()
    load = fine_tuning.open_loader(settings, data, config, model)
    filling = 0.0 if way.published else time.perf_counter() - opened
    folder = fine_tuning.make_folder(settings, data, None)
    task = fine_tuning.make_task(settings, data, begin, load, folder)
    if way.published:
        task.objective = PublishedStep(model)
    trainer = fine_tuning.make_trainer(settings, config, model, task, folder)
    run = fine_tuning.Run(settings, folder, data, model, task, trainer, {})
    fine_tuning.log_fusion(settings, trainer)

    curve = Curve([], [], [], [], filling)
    validation = 0.0
    started = time.perf_counter() - filling

    def validate(stop_if_asked: Callable[[], None]) -> dict[str, Any]:
        nonlocal started, validation
        before = time.perf_counter()
        curve.seconds.append(before - started)
        metrics = fine_tuning.score(run, stop_if_asked)
        validation += time.perf_counter() - before
        curve.quality.append(float(metrics[CIRR.headline]))
        curve.test.append(score_test(model, test, test_images))
        curve.losses.append(trainer.progress.train_rows[-1]["train_loss"])
        started += time.perf_counter() - before
        return metrics

    trainer.train(validate, lambda *_: None)
    return curve._replace(validation=validation)


def open_cached(model: Blip2QformerCirAlignPrompt, test: CIRR, data: Path) -> Loader:
    """The test split's images from a cache of their own: scoring them has no part in what is timed."""
    return open_images(
        model,
        {"transform": "targetpad", "target_ratio": 1.25},
        test.image_paths(),
        feature_cache=data / "test_features",
        cache_dtype="float32",
        batch_size=64,
        num_workers=0,
    )


def score_test(model: Blip2QformerCirAlignPrompt, test: CIRR, load: Loader) -> float:
    """mean(R@5+R_s@1) on the test split, in percent."""
    (split,) = test.splits
    ranking = rank_split(split, encode_split(model, split, load, batch_size=64, num_workers=0))
    return float(test.metrics([ranking])[CIRR.headline])


# --- from curves to rows


def mean_quality(curves: list[Curve]) -> list[float]:
    """The validation after each epoch, as a mean over the seeds."""
    return [fmean(values) for values in zip(*(curve.quality for curve in curves), strict=True)]


def first_epoch(quality: list[float], line: float) -> int | None:
    """The first epoch, from 0, at whose end ``line`` is reached, without interpolating; None if never."""
    return next((epoch for epoch, value in enumerate(quality) if value >= line), None)


def minutes_until(curves: list[Curve], epoch: int) -> list[float]:
    """Each seed's minutes of training until the end of an epoch, from 0."""
    return [curve.seconds[epoch] / 60 for curve in curves]


def rows_of(found: dict[str, list[Curve]]) -> list[Row]:
    """A row a way.

    The line is :data:`SLACK` below the best that plain SPRC's mean over the seeds is after any epoch; without
    LAVIS it is of ours without fusion, whose arithmetic is the same. A way is there when its own mean is.

    Args:
        found: the keys of :data:`WAYS` to a curve a seed, the same seeds for each.
    """
    reference = "plain" if "plain" in found else "off"
    best = max(mean_quality(found[reference]))
    whose = f"line {best - SLACK:.1f}, {SLACK:g} below the best of {WAYS[reference].title}"
    rows = [row_of(key, curves, found[reference], best, whose) for key, curves in found.items()]
    if "plain" not in found:
        rows.insert(0, not_measured(row_name("plain"), "", NO_LAVIS))
    return rows


def row_name(key: str) -> str:
    """What a way's row is called."""
    return f"time to plain SPRC's best validation, `tiny`, built-in data: {WAYS[key].title}"


def row_of(key: str, curves: list[Curve], reference: list[Curve], best: float, whose: str) -> Row:
    """Minutes until a way is at the line, how they compare with the reference's, and what else was seen."""
    quality = mean_quality(curves)
    epochs = len(quality)
    epoch = first_epoch(quality, best - SLACK)
    details = [whose]
    if epoch is None:
        value = f"not reached in {epochs} epochs"
        details.append(f"best {max(quality):.1f}")
    else:
        minutes = minutes_until(curves, epoch)
        value = in_words(minutes, "{:.2f} min".format)
        details.append(f"after epoch {epoch + 1} of {epochs} with {quality[epoch]:.1f}")
        details.append(f"test split {fmean(curve.test[epoch] for curve in curves):.1f}")
        if curves is not reference:
            details.append(compared(minutes, reference, best - SLACK))
    if len(curves) > 1:
        pairs = zip(curves, reference, strict=True)
        own = [first_epoch(one.quality, max(other.quality) - SLACK) for one, other in pairs]
        words = ", ".join("never" if one is None else str(one + 1) for one in own)
        details.append(f"seed by seed, against the line of its own seed, after epoch {words}")
    exact = first_epoch(quality, best)
    details.append(f"at the best itself {'never' if exact is None else f'after epoch {exact + 1}'}")
    details.append(f"{median(seconds_an_epoch(curves)):.1f} s an epoch")
    if curves[0].filling:
        filling = median(curve.filling for curve in curves)
        details.append(f"cache filled in {filling:.1f} s, once, which is counted")
    validation = median(curve.validation for curve in curves) / epochs
    details.append(f"a validation, which is not, {validation:.1f} s")
    return Row(row_name(key), "", value, "; ".join(details))


def compared(minutes: list[float], reference: list[Curve], line: float) -> str:
    """How many times as long the reference takes to a line that it reaches, seed by seed, in words."""
    epoch = first_epoch(mean_quality(reference), line)
    assert epoch is not None
    ratios = [a / b for a, b in zip(minutes_until(reference, epoch), minutes, strict=True)]
    return f"{in_words(ratios, '{:.2f} x'.format)} as fast"


def in_words(values: list[float], write: Callable[[float], str]) -> str:
    """Median, least and largest of the seeds; of one seed its own."""
    if len(values) == 1:
        return write(values[0])
    return f"{write(median(values))} ({write(min(values))} to {write(max(values))})"


def seconds_an_epoch(curves: list[Curve]) -> list[float]:
    """Seconds of each epoch of each seed: steps, and what has to be made before them."""
    found = []
    for curve in curves:
        starts = [curve.filling, *curve.seconds[:-1]]
        found += [end - begin for begin, end in zip(starts, curve.seconds, strict=True)]
    return found


# --- the commands


def compare(
    seeds: list[int], epochs: int, sizes: dict[str, int], device: str, tell: Callable[[str], None]
) -> dict[str, list[Curve]]:
    """Train each way with each seed, all ways of a seed in turns; ``tell`` is given a line a training."""
    ways = {key: way for key, way in WAYS.items() if HAS_LAVIS or not way.published}
    found: dict[str, list[Curve]] = {key: [] for key in ways}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        with (data / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            make_cirr(data, SyntheticConfig(**sizes))
        for seed in seeds:
            for key, way in ways.items():
                curve = in_fresh_process(train_apart, way, data, epochs, seed, device)
                found[key].append(curve)
                points = ", ".join(
                    f"{value:.1f} ({test:.1f}) at {seconds:.0f} s"
                    for value, test, seconds in zip(curve.quality, curve.test, curve.seconds, strict=True)
                )
                tell(f"{way.title}, seed {seed}: validation (test) {points}")
    return found


def run(settings: Settings) -> list[Row]:
    """On a third of the built-in data, few epochs, one seed: the table has to be there in half an hour."""
    sizes = {"train_families": 80}
    epochs = 4
    if settings.quick:
        sizes, epochs = {"train_families": 2, "val_families": 1, "test_families": 1}, 2
    found = compare(
        [0], epochs, sizes, settings.device, lambda line: print(line, file=sys.stderr, flush=True)
    )
    return rows_of(found)


def main() -> None:
    """Print a line a training, then a row a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="default: 0")
    add("--epochs", type=int, default=6, help="of each training; default: %(default)s")
    families = SyntheticConfig.train_families
    add("--train-families", type=int, default=families, metavar="N", help=f"of the data; default: {families}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs} is too small; the least is 1")
    sizes = {"train_families": arguments.train_families}
    found = compare(
        arguments.seeds, arguments.epochs, sizes, arguments.device, lambda line: print(line, flush=True)
    )
    for row in rows_of(found):
        print(f"{row.name}: {row.cell}")


if __name__ == "__main__":
    main()
