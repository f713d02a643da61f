"""The checkpoints that others have published: what each is called, what it is, and how to get it.

What is said here is in their authors' READMEs, code or papers; what is in none of these is None. Most lie in
clouds that want a browser, and all are pickles: none is fetched from here. One that is missing is asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from sprc.errors import InputError
from sprc.files import hash_file
from sprc.settings import ROOT

# Figures of two protocols cannot be compared.
CIRR_TEST = "CIRR's test split, scored by its server"
FIQ_VAL = "FashionIQ's validation split, original gallery (image_splits), mean of the three types"
CIRR_NAMES = ("recall_at1", "recall_at5", "group_recall_at1", "mean(R@5+R_s@1)")
FIQ_NAMES = ("average_recall_at10", "average_recall_at50")


@dataclass(frozen=True)
class Published:
    """A published checkpoint. Parameters, with shapes: :func:`sprc.models.descendants.parameters_of`."""

    name: str  # in --model-path and sprc.load
    method: str
    dataset: str  # "cirr" or "fashioniq"
    backbone: str
    file: str  # what it has to be called here
    called: str | None  # what its authors call it
    where: str  # it can be downloaded
    kind: str = "sprc"  # which class computes it, see sprc.models.descendants.CLASSES
    figures: tuple[float, ...] | None = None  # in percent; None where no figure of this very file is known
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Where it is looked for: in the folder `models`."""
        return ROOT / "models" / self.file

    @property
    def protocol(self) -> str | None:
        """What the figures are of: data set, split, gallery."""
        return None if self.figures is None else CIRR_TEST if self.dataset == "cirr" else FIQ_VAL

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by name; empty where none is known."""
        names = CIRR_NAMES if self.dataset == "cirr" else FIQ_NAMES
        return dict(zip(names, self.figures or (), strict=bool(self.figures)))

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in self.metrics.items())
        published = f"{figures} ({self.protocol})" if figures else "figures unknown here"
        there = "is there" if self.path.is_file() else f"is missing: {self.how_to_get()}"
        return (
            f"{self.name}: {self.method}, {self.dataset}, {self.backbone}; {published}; {self.path} {there}"
        )

    def how_to_get(self) -> str:
        """In words: where it is, and what to do with it."""
        theirs = "" if self.called in (None, self.file) else f", where it is called {self.called},"
        return f"download it {self.where}{theirs} and put it there as {self.path.name}"

    def check(self, path: Path) -> str:
        """A line for the user about the file's SHA-256; :class:`InputError` if it is known and another."""
        found = hash_file(path, hashlib.sha256())
        if self.sha256 is None:
            return f"published as {self.name}; none knows its SHA-256 here, and what was read has {found}"
        if found != self.sha256:
            raise InputError(
                f"{path} is not {self.name} as published: its SHA-256 is {found} and not {self.sha256}; "
                f"{self.how_to_get()}, or give it another name"
            )
        return f"published as {self.name}, and the file is as published"


SPRC_CLOUD = "with a browser from the {} links in the README of https://github.com/chunmeifeng/SPRC"
TME_CLOUD = "with a browser from https://www.kaggle.com/models/charlesneilsucian/tme/pyTorch/{}"

_sprc = Published(
    "sprc-cirr",
    "SPRC (Bai et al., ICLR 2024)",
    "cirr",
    "pretrain",
    "sprc_cirr.pt",
    "sprc_cirr.pt",
    SPRC_CLOUD.format("OneDrive or Baidu"),
    figures=(51.96, 82.12, 80.65, 81.39),
)
_spn = Published(
    "spn4cir-cirr",
    "SPN4CIR on SPRC (Feng et al., ACM MM 2024)",
    "cirr",
    "pretrain",
    "spn4cir_cirr.pt",
    "checkpoints/cirr_blip2/best.pt",
    "by hand from https://huggingface.co/BUAADreamer/SPN4CIR",
    kind="spn4cir",
    figures=(55.06, 83.83, 81.54, 82.69),
)
_tme = Published(
    "tme-cirr",
    "TME (CVPR 2025), trained without synthetic noise",
    "cirr",
    "pretrain",
    "tme_cirr.pth",
    None,
    TME_CLOUD.format("cirr-0.0-best"),
    kind="tme",
)
PUBLISHED = (
    _sprc,
    replace(
        _sprc,
        name="sprc-fashioniq",
        dataset="fashioniq",
        file="sprc_fiq.pt",
        called="sprc_fiq.pt",
        figures=(54.72, 74.97),
    ),
    replace(
        _sprc,
        name="sprc-cirr-vitl",
        backbone="pretrain_vitL",
        file="sprc_cirr_vitl.pt",
        called="sprc_cirr_vitl.pt",
        where=SPRC_CLOUD.format("Google Drive"),
        figures=(50.70, 80.65, 79.59, 80.12),
    ),
    replace(
        _sprc,
        name="sprc-fashioniq-vitl",
        dataset="fashioniq",
        backbone="pretrain_vitL",
        file="sprc_fiq_vitl.pt",
        called="sprc_fiq_vitl.pt",
        where=SPRC_CLOUD.format("Google Drive"),
        figures=None,
    ),
    _spn,
    replace(
        _spn,
        name="spn4cir-fashioniq",
        dataset="fashioniq",
        file="spn4cir_fiq.pt",
        called="checkpoints/fiq_blip2/best.pt",
        figures=(56.37, 76.45),
    ),
    _tme,
    replace(
        _tme,
        name="tme-fashioniq",
        dataset="fashioniq",
        file="tme_fiq.pth",
        where=TME_CLOUD.format("fashioniq-0.0-best"),
    ),
)


def list_pretrained() -> tuple[Published, ...]:
    """The published checkpoints that are known here, each with what to do to get it."""
    return PUBLISHED


def published_as(name: str) -> Published | None:
    """The checkpoint that is called so in ``--model-path``, if one is."""
    return next((one for one in PUBLISHED if one.name == name.lower()), None)


def published_in(path: Path) -> Published | None:
    """The checkpoint whose file is called as ``path`` is, if one's is."""
    return next((one for one in PUBLISHED if one.file == path.name), None)


def require_published(one: Published) -> Path:
    """Where a published checkpoint's file is; :class:`InputError` says how to get it where it is not."""
    if not one.path.is_file():
        raise InputError(
            f"{one.name} is {one.method} for {one.dataset}, and {one.path} is missing; {one.how_to_get()}"
        )
    return one.path
