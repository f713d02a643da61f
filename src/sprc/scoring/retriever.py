"""Pictures and texts to vectors, for programs: what ``sprc.load`` returns.

The verbs are those of sentence-transformers. Pictures are prepared as the model's training prepared them, and
as they are stored: EXIF's rotation is not looked at, as in training and validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sprc.data.datasets import SteadyLoader
from sprc.data.images import Transform, inspect_images, load_image, prepare_image, require_short
from sprc.data.reading import require_words
from sprc.data.shared_memory import check_shared_memory
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import Checkpoint, load_checkpoint, saved_of
from sprc.models.device import choose_device, default_workers, memory_explained, place
from sprc.models.hub_folder import Saved
from sprc.models.model_path import find_model
from sprc.scoring.feature_cache import pixel_bytes
from sprc.scoring.ranking import score_blocks
from sprc.scoring.settings import SCORING_BATCH, ImageSettings

Picture = str | Path | Image.Image

# How pictures are prepared for a checkpoint that does not say it: as for SPRC's.
PREPROCESSING = {"transform": ImageSettings.transform, "target_ratio": ImageSettings.target_ratio}


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    backbone: str | None = None,
    model_name: str | None = None,
    vocab: str | Path | None = None,
    device: str | torch.device | None = None,
    transform: str | None = None,
    target_ratio: float | None = None,
) -> Retriever:
    """A trained model with its preprocessing.

    Args:
        path: a run's folder, of which the best checkpoint is taken, else the last; a checkpoint; a folder
            that :meth:`Retriever.save_pretrained` wrote; USER/NAME of the model hub, where one was pushed; or
            a name of :func:`sprc.list_pretrained`.
        revision: of the model hub's: a branch, a tag or a commit; by default the newest.
        backbone: "pretrain", "pretrain_vitL" or "coco", which a published SPRC checkpoint does not say,
            unless its file has the name of :func:`sprc.list_pretrained`.
        model_name: likewise; by default `blip2_cir_align_prompt`.
        vocab: `vocab.txt` of bert-base-uncased for a published checkpoint; by default the model hub's.
        device: "cpu", "cuda", "cuda:1", ...; by default a GPU, if there is one.
        transform: "targetpad" or "squarepad"; by default the training's own.
        target_ratio: of "targetpad"; by default the training's own.

    Raises:
        InputError: there is no checkpoint at ``path``, it cannot be loaded, or the device cannot be used.
    """
    on = choose_device(None if device is None else str(device))
    checkpoint = load_checkpoint(
        find_model(path, revision),
        model_name=model_name,
        backbone=backbone,
        vocab=None if vocab is None else Path(vocab),
    )
    retriever = Retriever.of(checkpoint, transform=transform, target_ratio=target_ratio)
    place(retriever.model, on)
    return retriever


@dataclass(frozen=True, eq=False, repr=False)
class Retriever:
    """A model in eval mode, and how it takes pictures.

    T queries, G gallery pictures, Q features of a picture, E their width. What is returned is on the CPU. A
    picture is a path or a PIL image; a list of them may hold both.
    """

    checkpoint: Checkpoint
    transform_name: str
    target_ratio: float

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, *, transform: str | None = None, target_ratio: float | None = None
    ) -> Retriever:
        """The model of a checkpoint where it is; what is not given is its training's own.

        Raises :class:`InputError` for an unknown transform or an impossible ratio.
        """
        own = {**PREPROCESSING, **checkpoint.hyperparameters}
        retriever = cls(
            checkpoint,
            own["transform"] if transform is None else transform,
            own["target_ratio"] if target_ratio is None else target_ratio,
        )
        _ = retriever.transform  # which refuses what cannot be
        return retriever

    def __repr__(self) -> str:
        return f"<Retriever {self.checkpoint.found}, on {self.device}>"

    @property
    def model(self) -> Blip2QformerCirAlignPrompt:
        """The model itself."""
        return self.checkpoint.model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    @property
    def transform(self) -> Transform:
        """From a PIL image to the (3, S, S) pixels that the model takes."""
        return make_transform(self.transform_name, self.model.config.image_size, self.target_ratio)

    @torch.no_grad()
    def encode_query(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        *,
        batch_size: int = SCORING_BATCH,
        num_workers: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """The query of each reference picture with its text: (T, E), normalised.

        A picture that stands in several queries passes the vision transformer once.

        Args:
            images: T of them, or one.
            texts: what to change in each, as many as pictures. Cleaned as captions are.
            batch_size: pictures, and queries, at once.
            num_workers: processes that read pictures; by default by the cores, and none for a few pictures.
            progress: draw a bar if it takes longer than a second.

        Raises:
            InputError: as many texts as pictures are not given, a text holds no word, or a picture cannot be
                read.
        """
        pictures, words = as_list(images, Picture, "images"), as_list(texts, str, "texts")
        if len(pictures) != len(words):
            raise InputError(
                f"encode_query got {counted(len(pictures), 'picture')} and {counted(len(words), 'text')}; "
                "give a text for each picture"
            )
        for number, text in enumerate(words):
            require_words(text, "the text" if len(words) == 1 else f"text {number} of {len(words)}")
        queries_of: dict[object, list[int]] = {}
        distinct: list[Picture] = []
        for number, picture in enumerate(pictures):
            key = id(picture) if isinstance(picture, Image.Image) else Path(picture)
            if key not in queries_of:
                distinct.append(picture)
            queries_of.setdefault(key, []).append(number)
        queries = list(queries_of.values())
        model = self.model
        found = torch.empty(len(words), model.config.embed_dim)

        def compose(start: int, pixels: Tensor) -> None:
            tokens = model.encode_image(pixels)
            pairs = [(row, q) for row in range(len(tokens)) for q in queries[start + row]]
            for first in range(0, len(pairs), batch_size):
                rows, numbers = (list(part) for part in zip(*pairs[first : first + batch_size], strict=True))
                text = model.tokenize([words[number] for number in numbers])
                found[numbers] = model.compose(tokens[rows], text).float().cpu()

        self._read(distinct, compose, "encode_query", batch_size, num_workers, progress)
        return found

    @torch.no_grad()
    def encode_document(
        self,
        images: Picture | Sequence[Picture],
        *,
        batch_size: int = SCORING_BATCH,
        num_workers: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """The features of gallery pictures: (G, Q, E), normalised. The arguments are :meth:`encode_query`'s.

        Raises :class:`InputError` if there is none, or one cannot be read.
        """
        pictures = as_list(images, Picture, "images")
        config = self.model.config
        found = torch.empty(len(pictures), config.num_query_tokens, config.embed_dim)

        def keep(start: int, pixels: Tensor) -> None:
            features = self.model.target_features(self.model.encode_image(pixels))
            found[start : start + len(features)] = features.cpu()

        self._read(pictures, keep, "encode_document", batch_size, num_workers, progress)
        return found

    def similarity(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Late interaction: the largest product of a query with one of a picture's features.

        Args:
            queries: (T, E) of :meth:`encode_query`.
            documents: (G, Q, E) of :meth:`encode_document`, on any device; float16 does as well.

        Returns:
            (T, G).

        Raises:
            InputError: the shapes are others.
        """
        width = self.model.config.embed_dim
        if queries.dim() != 2 or documents.dim() != 3 or {queries.shape[-1], documents.shape[-1]} != {width}:
            raise InputError(
                f"similarity got {tuple(queries.shape)} and {tuple(documents.shape)}; give queries "
                f"(T, {width}) of encode_query and documents (G, Q, {width}) of encode_document"
            )
        if not len(queries):
            return torch.empty(0, len(documents))
        return torch.cat([scores for _, scores in score_blocks(queries, documents)])

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **given: Any) -> Retriever:
        """:func:`load` under the model hub's verb."""
        return load(name, revision=revision, **given)

    def save_pretrained(self, folder: str | Path, *, save_full: bool = False) -> Path:
        """Write the model into ``folder``, made if need be, and return the folder.

        `config.json`, `model.safetensors`, `vocab.txt`, and a model card, `README.md`. :func:`load` takes the
        folder, and so does every script as --model-path.

        Args:
            folder: what is there under these names is replaced, once all of the new is written.
            save_full: with a frozen vision transformer, which else is left out: loading takes it from the
                backbone's files, and checks that it is the same.

        Raises:
            InputError: the folder cannot be made, or the vision transformer that is to be left out is not
                the backbone's.
            OSError: a file cannot be written, on a full disk for one.
        """
        from sprc.models.hub_model import save

        return save(self.saved(save_full=save_full), Path(folder))

    def push_to_hub(
        self, name: str, *, revision: str | None = None, private: bool | None = None, save_full: bool = False
    ) -> str:
        """Upload the same to the model hub, with huggingface_hub's own mixin; the address of its files.

        Args:
            name: USER/NAME; it is made if need be.
            revision: the branch, by default `main`.
            private: whether one that is made is private.
            save_full: see :meth:`save_pretrained`.

        Raises :class:`InputError` where the hub does not take it: what to do is in the message.
        """
        from sprc.models.hub_model import push

        return push(self.saved(save_full=save_full), name, revision=revision, private=private)

    def saved(self, *, save_full: bool) -> Saved:
        """What is saved of the model; see :meth:`save_pretrained`."""
        checkpoint = self.checkpoint
        told = {
            **checkpoint.hyperparameters,
            "transform": self.transform_name,
            "target_ratio": self.target_ratio,
        }
        return saved_of(self.model, checkpoint.epoch, told, checkpoint.source, full=save_full)

    def _read(
        self,
        pictures: list[Picture],
        take: Callable[[int, Tensor], None],
        title: str,
        batch_size: int,
        num_workers: int | None,
        progress: bool,
    ) -> None:
        """Call ``take(start, pixels)`` with each batch, (B, 3, S, S) on the device, of the pictures."""
        check_pictures(pictures)
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value is not None and value < least:
                raise InputError(f"{name} {value} is too small; the least is {least}")
        if num_workers is None:
            num_workers = default_workers(self.device) if len(pictures) > batch_size else 0
        check_shared_memory(batch_size * pixel_bytes(self.model), num_workers)
        loader = SteadyLoader(
            Pictures(pictures, self.transform), batch_size=batch_size, num_workers=num_workers
        )
        bar = tqdm(total=len(pictures), desc=title, unit="picture", delay=1, disable=not progress)
        with bar, memory_explained(self.device, batch_size, ["a smaller batch_size"]):
            start = 0
            for pixels in loader:
                take(start, pixels.to(self.device))
                start += len(pixels)
                bar.update(len(pixels))


class Pictures(Dataset[Tensor]):
    """Pictures as the model takes them, (3, S, S); raises :class:`InputError` for one that cannot be read."""

    def __init__(self, pictures: list[Picture], transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        if not isinstance(picture, Image.Image):
            return load_image(Path(picture), self.transform)
        return prepare_image(picture, self.transform, f"picture {index}, a PIL image,")


def as_list(given: Any, kind: Any, name: str) -> list[Any]:
    """An argument that may be one of a ``kind`` or several; :class:`InputError` if it is none, or others."""
    one = "a path or a PIL image" if kind is Picture else "a text"
    if isinstance(given, kind):
        return [given]
    if not isinstance(given, Iterable):
        raise InputError(f"{name} is a {type(given).__name__}; give {one}, or a list of them")
    items = list(given)
    if not items:
        raise InputError(f"{name} is empty; give {one}, or a list of them")
    for number, item in enumerate(items):
        if not isinstance(item, kind):
            raise InputError(f"{name}: number {number} is a {type(item).__name__}; give {one}")
    return items


def check_pictures(pictures: list[Picture]) -> None:
    """Look at the pictures, before any is encoded; :class:`InputError` for a bad one."""
    for number, picture in enumerate(pictures):
        if isinstance(picture, Image.Image):
            require_short(picture, f"picture {number}, a PIL image,")
    paths = list(dict.fromkeys(Path(p) for p in pictures if not isinstance(p, Image.Image)))
    bad = [
        (path, found.problem)
        for path, found in zip(paths, inspect_images(paths), strict=True)
        if found.problem
    ]
    if bad:
        path, problem = bad[0]
        if not path.exists():
            problem = f"the picture {path} does not exist; correct its path"
        others = f" ({len(bad)} of {len(paths)} pictures cannot be used)" if len(paths) > 1 else ""
        raise InputError(f"{problem}{others}")


def counted(count: int, name: str) -> str:
    """``2 texts``."""
    return f"{count} {name}{'s' * (count != 1)}"
