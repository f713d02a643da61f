"""An index of a folder of pictures: each one's features as a search target, on disk.

    index.json       the folder of pictures, and the model and preprocessing that made the features
    pictures.json    the pictures in the order of their names: size and times, digest of the bytes,
                     checksum of the features; those left out, and why; the number of the files below
    vectors-N.bin    their features, (G, Q, E) in float16, which readers map into memory
    pooled-N.bin     the mean over an image's Q features, (G, E) in float16, for `--engine faiss`
    lance-N          the same in a table of LanceDB's, for `--engine lancedb`; only with `--lancedb`

:mod:`sprc.search.indexing` makes it and replaces `pictures.json` last and at once: readers see the old index
or the new one.
"""

import hashlib
import json
import mmap
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.digests import weights_digest
from sprc.models.switches import SWITCHES

FORMAT = 1


class Identity(NamedTuple):
    """What features depend on beside the picture."""

    model: str  # a hash of weights, configuration and vocabulary
    transform: str
    target_ratio: float | None  # None for "squarepad", which has none


class Result(NamedTuple):
    """A picture found."""

    name: str
    path: Path
    score: float  # the similarity, of the first stage
    match: float | None = None  # the re-ranker's score, the logit of a match, if it has looked at it

    @property
    def scores(self) -> str:
        """Its scores, to be shown."""
        return f"{self.score:.4f}" if self.match is None else f"{self.score:.4f}, {self.match:+.2f}"


class Picture(NamedTuple):
    """A picture of an index."""

    name: str  # its path below the folder of pictures
    looks: list[int]  # of its file; empty if it was written so lately that it may change unseen
    digest: str  # of its file's bytes
    crc: int  # of its features


@dataclass(frozen=True, eq=False)
class PictureIndex:
    """A finished index: G pictures, sorted by name. Reads no features before they are asked for."""

    path: Path  # the index
    folder: Path  # the pictures
    identity: Identity
    scored_as: dict[str, Any]  # model_path, blip_model_name, backbone, vocab: how the model is loaded
    shape: tuple[int, int]  # (Q, E)
    pictures: list[Picture]
    left_out: dict[str, str]  # name to reason
    generation: int

    @cached_property
    def names(self) -> list[str]:
        """Of the pictures, in the gallery's order."""
        return [picture.name for picture in self.pictures]

    @cached_property
    def number(self) -> dict[str, int]:
        """Gallery index by name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def by_digest(self) -> dict[str, list[int]]:
        """Gallery indices of the pictures with the same bytes."""
        found: dict[str, list[int]] = {}
        for i, picture in enumerate(self.pictures):
            found.setdefault(picture.digest, []).append(i)
        return found

    @cached_property
    def gallery(self) -> Tensor:
        """(G, Q, E) float16, mapped from the file."""
        return torch.from_numpy(self._vectors)

    @cached_property
    def _vectors(self) -> np.memmap:
        return self._map("vectors", (len(self.pictures), *self.shape))

    def read_here_and_there(self) -> None:
        """Tell the system that few pictures of the gallery are read, and not all in their order.

        Else it reads megabytes around each of them from the disk.
        """
        mapped: Any = self._vectors
        if hasattr(mmap, "MADV_RANDOM"):
            mapped._mmap.madvise(mmap.MADV_RANDOM)

    @cached_property
    def pooled(self) -> Tensor:
        """(G, E) float16, mapped from the file: the mean over each picture's Q features."""
        return torch.from_numpy(self._map("pooled", (len(self.pictures), self.shape[1])))

    def path_of(self, name: str) -> Path:
        """Where the picture ``name`` is; it never lies outside the folder of pictures.

        Raises :class:`InputError` for a name that the index does not hold, a file that is gone, and a link
        that now leads elsewhere.
        """
        if name not in self.number:
            raise InputError(f"{printable(name)} is not in the index {self.path}; take a name from it")
        path = self.folder / name
        if not path.is_file():
            raise InputError(f"{printable(path)} is gone; run `search.py index` again")
        if not path.resolve().is_relative_to(self.folder):
            raise InputError(f"{printable(path)} now leads out of {self.folder}; run `search.py index` again")
        return path

    def _map(self, kind: str, shape: tuple[int, ...]) -> np.memmap:
        file = self.path / f"{kind}-{self.generation}.bin"
        if not file.is_file() or file.stat().st_size != 2 * np.prod(shape):
            raise InputError(f"{file} is missing or cut short; run `search.py index` again")
        # Copy on write, since torch wants to be able to write.
        return np.memmap(file, np.float16, "c", shape=shape)


# --- reading


def open_index(path: Path) -> PictureIndex:
    """The finished index at ``path``; raises :class:`InputError` if there is none, or it is damaged."""
    described = read_description(path)
    if described is None:
        raise InputError(f"there is no index in {path}; make one: search.py index FOLDER --model-path FILE")
    if not (path / "pictures.json").exists():
        raise InputError(
            f"the index {path} is not finished; run `search.py index` again: it goes on where it was"
        )
    return read_index(path, described)


def read_description(path: Path) -> dict[str, Any] | None:
    """The contents of `index.json`, None if there is none; a damaged one raises :class:`InputError`."""
    described = _read(path / "index.json")
    if described is None:
        return None
    try:
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']}, not {FORMAT}")
        described["identity"] = Identity(**described["identity"])
        described["shape"] = tuple(int(size) for size in described["shape"])
        described["folder"] = Path(described["folder"])
        dict(described["scored_as"])
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path / "index.json", error) from error
    return described


def read_index(path: Path, described: dict[str, Any]) -> PictureIndex:
    """The index at ``path`` that its `index.json` describes, without pictures where it is not finished."""
    file = path / "pictures.json"
    contents = _read(file)
    if contents is None:
        contents = {"pictures": [], "left_out": {}, "generation": 0}
    try:
        pictures = [
            Picture(str(name), list(looks), str(digest), int(crc))
            for name, looks, digest, crc in contents["pictures"]
        ]
        return PictureIndex(
            path,
            described["folder"],
            described["identity"],
            described["scored_as"],
            described["shape"],
            pictures,
            dict(contents["left_out"]),
            int(contents["generation"]),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(file, error) from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is damaged ({error}); run `search.py index` with --rebuild")


def printable(text: str | Path) -> str:
    """A file's name for a terminal or a page: one line, no control characters, and valid UTF-8."""
    text = os.fsencode(text).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- the model


def identity_of(model: Blip2QformerCirAlignPrompt, transform: str, target_ratio: float) -> Identity:
    """What the features that a model makes depend on; it must still be in the checkpoint's type."""
    words = model.tokenizer.convert_ids_to_tokens(list(range(model.tokenizer.vocab_size)))
    weights = {key: value for key, value in model.state_dict().items() if key != SWITCHES}  # the config's
    told = json.dumps([weights_digest(weights), asdict(model.config), words], sort_keys=True)
    digest = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
    return Identity(digest, transform, target_ratio if transform == "targetpad" else None)


def refuse_other_model(path: Path, made: Identity, made_by: str, identity: Identity, given: str) -> None:
    """Raise :class:`InputError` if the index at ``path`` is of another model or preprocessing.

    ``made`` and ``made_by`` are the index's, ``identity`` and ``given`` the present model's: what features
    depend on, and the checkpoint's path.
    """
    if made.model != identity.model:
        raise InputError(
            f"the index {path} was made by another model ({made_by}, {made.model[:8]}) than {given} "
            f"({identity.model[:8]}); give another --index, or `search.py index --rebuild` to replace it"
        )
    if made != identity:
        raise InputError(
            f"the index {path} was made with {made.transform} {made.target_ratio or ''}, not with "
            f"{identity.transform} {identity.target_ratio or ''}; leave --transform and --target-ratio out, "
            "give another --index, or add --rebuild to replace it"
        )
