"""The ablation's grid: which trainings it compares. Imports no torch."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sprc.config import FUSION_STARTS, FUSION_TEXTS, POOLS, RERANKER, STRATEGIES
from sprc.data import DATASETS, TRAINED_ON, TRAINED_ON_METAVAR
from sprc.errors import InputError
from sprc.settings import ROOT, setting, settings_of

OFF = "off"
# What a cell is, but for its seed.
SWITCHES = ("fusion", "alpha", "start", "pool", "text", "rate", "warmup", "flags", "then")
LONGEST_NAME = 200  # of a cell's folder; file systems take 255
# What the grid sets itself. argparse takes a flag's beginning for the flag, so those are refused as well.
OWN_FLAGS = (
    "--use-gated-fusion",
    "--no-use-gated-fusion",
    "--fusion-strategy",
    "--alpha-init",
    "--fusion-start",
    "--pool",
    "--fusion-text",
    "--fusion-lr",
    "--warmup-fusion",
    "--seed",
    "--save-training",
    "--save-best",
    "--models-path",
    "--resume",
    "--device",
    "--model-path",
)


@dataclass(frozen=True)
class Cell:
    """One training of the grid; None stands for a switch that does not touch the fusion."""

    fusion: str
    alpha: float | None
    start: str | None
    pool: str | None
    seed: int
    text: str | None = None  # None also for "embeddings", the default
    rate: float | None = None  # of the fusion's parameters; None is the training's own
    warmup: int | None = None  # epochs in which only the fusion learns; None is none
    flags: str | None = None  # further flags of the training; None is none
    then: str | None = None  # further flags of a training that starts from this one's; None is none

    @property
    def first_stage(self) -> "Cell | None":
        """The cell that a second training starts from; None for a cell that is none."""
        return None if self.then is None else replace(self, then=None)

    @property
    def reranks(self) -> bool:
        """Whether it is a re-ranker, to be scored behind its first stage."""
        return self.then is not None and RERANKER in shlex.split(self.then)

    @property
    def variant(self) -> str:
        """The cell's name without its seed: what a row of the table and a line of the plots is."""
        alpha = None if self.alpha is None else f"alpha{self.alpha:g}"
        rate = None if self.rate is None else f"lr{self.rate:g}"
        warmup = None if self.warmup is None else f"warmup{self.warmup}"
        flags = None if self.flags is None else as_name(self.flags)
        then = None if self.then is None else as_name(f"then {self.then}")
        if self.reranks and then is not None:
            then = then.replace("then_", "").replace(f"blip-model-name_{RERANKER}", "rerank")
        parts = (self.fusion, alpha, self.start, self.pool, self.text, rate, warmup, flags, then)
        return "-".join(part for part in parts if part is not None)

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.variant}-seed{self.seed}"

    def arguments(self) -> list[str]:
        """The cell's own arguments of ``blip_fine_tune_2.py``, which win over those of all cells.

        Of a second training the path of the first one's checkpoint is to come behind ``--model-path``.
        """
        last = ["--seed", str(self.seed)]
        if self.then is None:
            further = [] if self.flags is None else shlex.split(self.flags)
        else:
            further, last = shlex.split(self.then), [*last, "--model-path"]
        if self.reranks:  # whose first stage brings its fusion
            return [*further, *last]
        if self.fusion == OFF:
            return [*further, "--no-use-gated-fusion", *last]
        switches = {"--alpha-init": self.alpha, "--fusion-start": self.start, "--pool": self.pool}
        switches |= {"--fusion-text": self.text, "--fusion-lr": self.rate, "--warmup-fusion": self.warmup}
        given = [str(item) for pair in switches.items() if pair[1] is not None for item in pair]
        strategy = ["--use-gated-fusion", "--fusion-strategy", self.fusion]
        return [*further, *strategy, *given, *last]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """The grid, and the training's own flags. A value that cannot work raises :class:`InputError`.

    A value that is there twice counts once. YAML reads a bare ``off`` as false, which is taken for it.
    ``grids`` are changes to the lists above, each a grid of its own: one switch at a time, say.
    """

    fusion: Sequence[str] = setting(
        (OFF, "gated"), metavar="NAME", help=f"{', '.join((OFF, *STRATEGIES))}; default: off gated"
    )
    alpha: Sequence[float] = setting((0.5,), help="starts of alpha; default: 0.5")
    start: Sequence[str] = setting(("auto",), help=f"{', '.join(FUSION_STARTS)}; default: auto, its own")
    pool: Sequence[str] = setting(("masked",), help=f"{', '.join(POOLS)}; default: masked")
    text: Sequence[str] = setting(("embeddings",), help=f"{', '.join(FUSION_TEXTS)}; default: embeddings")
    # None is --learning-rate.
    rate: Sequence[float | None] = setting(
        (None,), help="the fusion's own learning rates; default: the training's"
    )
    warmup: Sequence[int] = setting((0,), help="epochs in which only the fusion learns; default: 0")
    flags: Sequence[str] = setting(
        ("",), help="further flags of the training, quoted: '' '--negatives bank'; default: none"
    )
    then: Sequence[str] = setting(
        (OFF,),
        help="a second training from each first one: off, or its further flags, quoted: "
        f"'--blip-model-name {RERANKER} --num-epochs 2'; default: off",
    )
    seeds: Sequence[int] = setting((0, 1, 2), help="default: 0 1 2")
    training: Sequence[str] = setting(
        (), positional=True, nargs="*", metavar="-- FLAG", help="of src/blip_fine_tune_2.py"
    )
    baseline: str = setting(
        OFF, metavar="VARIANT", help="what the others are compared with, as the table names it; default: off"
    )
    grids: Sequence[dict[str, Any]] = ()  # none: one grid of the lists above

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name in ("grids", "baseline"):
                continue
            empty = not values and field.name != "training"  # whose flags are asked for below
            if isinstance(values, str) or not isinstance(values, Sequence) or empty:
                raise InputError(f"{field.name}={values!r}: give a list of at least one value")
            if field.name == "training":
                checked = tuple(map(str, values))  # YAML gives numbers as numbers
            else:
                checked = tuple(dict.fromkeys(self._checked(field.name, value) for value in values))
            object.__setattr__(self, field.name, checked)
        if "--dataset" not in refuse_own_flags(self.training, "training"):
            raise InputError("the training's flags lack --dataset; give it, and all others, after --")
        words = [word for one in self.training for word in one.split("=", 1)]
        dataset = words[words.index("--dataset") + 1 :][:1]
        if dataset and dataset[0].lower() in set(DATASETS) - set(TRAINED_ON):
            raise InputError(f"--dataset {dataset[0]} has no training split; give {TRAINED_ON_METAVAR}")
        if isinstance(self.grids, str) or not isinstance(self.grids, Sequence):
            raise InputError(f"grids={self.grids!r}: give a list of mappings")
        for grid in self.grids:
            if not isinstance(grid, dict) or not set(grid) <= set(SWITCHES):
                raise InputError(f"grids: {grid!r} is no mapping of {', '.join(SWITCHES)} to lists")
            replace(self, grids=(), baseline=OFF, **grid)  # its values are checked here
        if self.baseline is False:
            object.__setattr__(self, "baseline", OFF)
        self._check_variants()

    def _check_variants(self) -> None:
        cells = self.cells()
        for name, count in Counter(cell.name for cell in cells).items():
            if count > 1:
                raise InputError(f"flags: two values of the list give a cell the name {name}; leave one out")
            if len(name) > LONGEST_NAME:
                raise InputError(f"flags: {name} is too long for a folder's name; put files in shorter paths")
        variants = list(dict.fromkeys(cell.variant for cell in cells))
        if self.baseline != OFF and self.baseline not in variants:
            raise InputError(f"baseline={self.baseline!r} is no variant; choose from {', '.join(variants)}")

    @staticmethod
    def _checked(name: str, value: Any) -> Any:
        if name == "fusion" and value is False:
            value = OFF
        choices = {"fusion": (OFF, *STRATEGIES), "start": FUSION_STARTS, "pool": POOLS}
        choices["text"] = FUSION_TEXTS
        if name in choices:
            if value not in choices[name]:
                raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(choices[name])}")
            return value
        if name == "alpha":
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"alpha={value!r} must be a finite number")
            return float(value)
        if name == "then" and value in (False, OFF):  # as YAML reads a bare off
            return OFF
        if name in ("flags", "then"):
            if not isinstance(value, str):
                raise InputError(f"{name}={value!r} must be text, as '--num-epochs 3'; quote it")
            try:
                refuse_own_flags(shlex.split(value), name)
                if "--blip-model-name" in shlex.split(value) and name == "flags":
                    raise InputError(f"flags={value!r}: --blip-model-name is for `then`; leave it out")
            except ValueError as error:
                raise InputError(f"{name}={value!r} cannot be read ({error}); close its quotes") from error
            return value
        if name == "rate":
            if value is None:
                return None
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise InputError(f"rate={value!r} must be a positive number")
            return float(value)
        if type(value) is not int or value < 0:
            raise InputError(f"{name}={value!r} must be a whole number of at least 0")
        return value

    @classmethod
    def read(cls, path: Path | None, given: dict[str, Any]) -> "AblationConfig":
        """The values of a YAML file, if any, under those of the command line.

        Raises :class:`InputError` for a file that cannot be read, an unknown key, a wrong value.
        """
        values: Any = {}
        if path is not None:
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"--config {path} cannot be read ({error}); give a YAML file") from error
            known = [field.name for field in fields(cls)]
            if not isinstance(values, dict) or (unknown := sorted(map(str, set(values) - set(known)))):
                wrong = f"unknown key {', '.join(unknown)}" if isinstance(values, dict) else "no mapping"
                raise InputError(f"--config {path}: {wrong}; its keys are {', '.join(known)}")
        return cls(**{**values, **given})

    def cells(self) -> list[Cell]:
        """The grids' cells, each once: a switch that does not touch a fusion does not multiply it.

        Before a second training comes its first one, whether the grids name that or not. The first seed's
        cells come first, so that a grid that is stopped early compares all its variants.
        """
        grids = [replace(self, grids=(), baseline=OFF, **grid) for grid in self.grids] or [self]
        cells: dict[Cell, None] = {}
        for seed in self.seeds:
            for grid in grids:
                for switches in product(*(getattr(grid, switch) for switch in SWITCHES)):
                    cell = cell_of(seed, *switches)
                    if cell.first_stage is not None:
                        cells[cell.first_stage] = None
                    cells[cell] = None
        return list(cells)


def as_name(flags: str) -> str:
    """Flags as a part of a folder's name."""
    words = (word.removeprefix("--") for word in shlex.split(flags))
    return re.sub(r"[^\w.,=+-]+", "_", "_".join(words))


def refuse_own_flags(arguments: Sequence[str], where: str) -> list[str]:
    """The flags of ``arguments``; raises :class:`InputError` for one that the grid sets itself."""
    names = [item.split("=")[0] for item in arguments if item.startswith("--")]
    for name in names:
        if owned := [flag for flag in OWN_FLAGS if flag.startswith(name)]:
            raise InputError(f"{name}: the ablation sets {owned[0]} itself; leave it out of {where}")
    return names


def cell_of(
    seed: int,
    fusion: str,
    alpha: float,
    start: str,
    pool: str,
    text: str,
    rate: float | None,
    warmup: int,
    flags: str,
    then: str,
) -> Cell:
    """The cell of these switches, in :data:`SWITCHES`' order, without those that do not touch its fusion."""
    second = None if then == OFF else then
    if fusion == OFF:
        return Cell(OFF, None, None, None, seed, flags=flags or None, then=second)
    strategy = STRATEGIES[fusion]
    contextual = text == "contextual"
    if start == "auto":
        start = strategy.start
    if contextual:
        pool = "masked"  # contextual words have no padding
    return Cell(
        fusion,
        alpha if strategy.has_alpha else None,
        start if strategy.has_identity else None,
        pool if strategy.pools else None,
        seed,
        text if contextual and not strategy.contextual else None,
        rate,
        warmup or None,
        flags or None,
        second,
    )


@dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """Where the ablation goes, and on what it runs; the grid's own flags are :class:`AblationConfig`'s."""

    out: Path = setting(ROOT / "ablation", help="the ablation's folder; default: ablation/")
    config: Path | None = setting(
        None,
        metavar="YAML",
        help=f"the grid: lists under {', '.join(one.name for one in settings_of(AblationConfig))}; flags win "
        "over it. Several grids: changes to these lists, as a list of mappings under `grids`",
    )
    devices: Sequence[str] | None = setting(
        None,
        metavar="DEVICE",
        help="one running cell each, the cores shared out (OMP_NUM_THREADS wins): cuda:0 cuda:1, or cpu cpu; "
        "default: every GPU, or cpu",
    )
