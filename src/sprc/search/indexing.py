"""Make an index of a folder of pictures, or bring it up to date; see :mod:`sprc.search.index`.

    new.bin new.txt  what a run has computed, until it is finished: features, and a line each

Features are found by the bytes of the picture's file, so a renamed picture is not computed again and a
changed one is. A line in `new.txt` follows its features, so a killed run loses the batch it was at.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sprc.data.datasets import SteadyLoader
from sprc.data.images import Transform, image_loader, own_formats
from sprc.data.shared_memory import check_shared_memory
from sprc.data.transforms import upright_first
from sprc.errors import InputError
from sprc.files import hold_lock, write_atomically, write_json
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.records import Entry, RecordStore, intact
from sprc.scoring.feature_cache import pixel_bytes, require_reading
from sprc.scoring.retriever import Retriever
from sprc.search import lance
from sprc.search.folder import SUFFIXES, check_folder, find_pictures, look_at_pictures
from sprc.search.index import (
    FORMAT,
    Identity,
    Picture,
    PictureIndex,
    printable,
    read_description,
    read_index,
    refuse_other_model,
)

ROWS = 1024  # pictures copied at once
# All that an index's folder may hold.
FILES = (
    *("index.json", "pictures.json", "vectors-*.bin", "pooled-*.bin"),
    *("new.bin", "new.txt", "lock", "lock.held", ".*.tmp", "lance-*", "new-lance"),
)


@dataclass(frozen=True)
class Update:
    """What a run of :func:`update_index` did, in pictures."""

    index: PictureIndex
    added: int
    changed: int
    removed: int
    computed: int


def update_index(
    path: Path,
    folder: Path,
    retriever: Retriever,
    identity: Identity,
    scored_as: dict[str, Any],
    *,
    batch_size: int,
    num_workers: int,
    rebuild: bool = False,
    lancedb: bool | None = None,
) -> Update:
    """Make the index at ``path`` one of the pictures that ``folder`` holds now, and return it.

    Computes what is new or changed, leaves out what cannot be read, drops what is gone. A killed run's
    features are used.

    Args:
        path: of the index; made if it is not there.
        folder: of pictures, at any depth. Links are followed only to files inside it; names that start
            with a dot are left out.
        retriever: the model on its device.
        identity: of the model, see :func:`identity_of`.
        scored_as: `model_path`, `blip_model_name`, `backbone` and, if need be, `vocab` as they were given, to
            load it again.
        batch_size: pictures through the model at once.
        num_workers: processes that read pictures.
        rebuild: throw away what is at ``path`` if it is of another folder or model, or damaged.
        lancedb: make a table of LanceDB's too, or none; None makes one if there was one.

    Raises:
        InputError: ``folder`` holds no picture that can be read; ``path`` holds the index of another folder
            or model, or other files; the disk is too small; LanceDB is not installed.
        FloatingPointError: the model's features are not finite.
    """
    folder = folder.resolve()
    check_folder(folder)
    require_reading(batch_size, num_workers)
    found, left_out = find_pictures(folder)
    if not found and not left_out:
        raise InputError(f"{folder} holds no picture ({' '.join(SUFFIXES)}); give a folder that does")
    _make_folder(path)
    waiting = f"waiting for another process that changes {path}"
    with hold_lock(path / "lock", waiting=waiting, unwritable="give an --index that can be written"):
        _refuse_or_clear(path, folder, identity, scored_as, rebuild)
        before = _begin(path, folder, retriever, identity, scored_as)
        if lancedb is None:
            lancedb = lance.folder_of(path, before.generation).exists()
        if lancedb:
            lance.import_lancedb()  # here, and not when all is computed
        looked = {picture.name: (picture.looks, picture.digest) for picture in before.pictures}
        seen, unreadable = look_at_pictures(folder, found, looked)
        features = _Features(path, before)
        missing = features.missing({name: digest for name, (_, digest) in seen.items()})
        features.check_disk(len(missing), len(seen))
        failed = features.compute(missing, folder, retriever, batch_size, num_workers) if missing else {}
        left_out |= unreadable
        left_out |= {name: failed[digest] for name, (_, digest) in seen.items() if digest in failed}
        crcs = features.crcs()
        pictures = [
            Picture(name, looks, digest, crcs[digest])
            for name, (looks, digest) in sorted(seen.items())
            if digest not in failed
        ]
        _require_a_picture(folder, pictures, left_out)
        generation = features.write_generation(pictures, before)
        if lancedb:
            shape = (len(pictures), before.shape[1])
            pooled = np.memmap(path / f"pooled-{generation}.bin", np.float16, "r", shape=shape)
            lance.make_table(path, generation, pooled)
        _finish(path, generation, pictures, left_out)
        lance.remove_tables(path, generation if lancedb else None)
        return _compared(before, read_index(path, _description(path)), len(missing) - len(failed))


def _make_folder(path: Path) -> None:
    """Make the index's folder; one that holds other files raises :class:`InputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        other = sorted(set(path.iterdir()) - _files(path))
    except OSError as error:
        raise InputError(f"--index {path}: cannot be made ({error}); choose another") from error
    if other:
        raise InputError(
            f"--index {path} holds other files ({printable(other[0].name)}); give a folder of its own"
        )


def _files(path: Path) -> set[Path]:
    return {file for pattern in FILES for file in path.glob(pattern)}


def _refuse_or_clear(
    path: Path, folder: Path, identity: Identity, scored_as: dict[str, Any], rebuild: bool
) -> None:
    """Refuse an index of another folder or model, or with ``rebuild`` throw it away."""
    try:
        before = read_description(path)
        if before is not None:
            if before["folder"] != folder:
                raise InputError(
                    f"{path} is the index of {before['folder']}, not of {folder}; give another --index, "
                    "or add --rebuild to replace it"
                )
            made_by = before["scored_as"]["model_path"]
            refuse_other_model(path, before["identity"], made_by, identity, scored_as["model_path"])
            read_index(path, before)
    except InputError:
        if not rebuild:
            raise
        for file in _files(path) - {path / "lock", path / "lock.held"}:
            lance.remove(file)


def _begin(
    path: Path, folder: Path, retriever: Retriever, identity: Identity, scored_as: dict[str, Any]
) -> PictureIndex:
    """Write `index.json`, remove what a killed run was writing, and return the index as it is."""
    config = retriever.model.config
    described = {
        "format": FORMAT,
        "folder": str(folder),
        "identity": identity._asdict(),
        "scored_as": scored_as,
        "shape": (config.num_query_tokens, config.embed_dim),
    }
    write_json(path / "index.json", described)
    for file in path.glob(".*.tmp"):
        file.unlink()
    before = read_index(path, _description(path))
    lance.remove_tables(path, before.generation)  # a killed run's may be of other pictures than the next's
    return before


def _description(path: Path) -> dict[str, Any]:
    described = read_description(path)
    if described is None:
        raise InputError(f"{path / 'index.json'} is gone; another program took it away")
    return described


def _require_a_picture(folder: Path, pictures: list[Picture], left_out: dict[str, str]) -> None:
    """Raise :class:`InputError` if all are left out."""
    if not pictures:
        first = min(left_out)
        raise InputError(
            f"{folder}: none of {len(left_out)} pictures can be used; first: "
            f"{printable(first)}: {left_out[first]}"
        )


def _finish(path: Path, generation: int, pictures: list[Picture], left_out: dict[str, str]) -> None:
    """Put `pictures.json` in place, and remove what the finished index does not need."""
    contents = {"generation": generation, "pictures": pictures, "left_out": dict(sorted(left_out.items()))}
    text = json.dumps(contents).encode()
    # An index that stays as it is need not be read again by those who use it.
    if not (path / "pictures.json").exists() or (path / "pictures.json").read_bytes() != text:
        write_atomically(path / "pictures.json", lambda file: file.write(text))
    needed = {path / f"{kind}-{generation}.bin" for kind in ("vectors", "pooled")}
    for pattern in ("vectors-*.bin", "pooled-*.bin", "new.txt", "new.bin"):
        for file in set(path.glob(pattern)) - needed:
            file.unlink(missing_ok=True)


def _compared(before: PictureIndex, index: PictureIndex, computed: int) -> Update:
    """What is new, changed and gone in ``index``."""
    known = {picture.name: picture.digest for picture in before.pictures}
    return Update(
        index,
        added=sum(picture.name not in known for picture in index.pictures),
        changed=sum(known.get(p.name, p.digest) != p.digest for p in index.pictures),
        removed=len(set(known) - set(index.names)),
        computed=computed,
    )


class PictureDataset(Dataset[tuple[str, Tensor | str]]):
    """Pictures to be indexed: an item is ``(digest, pixels)``, or ``(digest, why it cannot be used)``."""

    def __init__(self, paths: dict[str, Path], transform: Transform) -> None:
        self.paths = paths
        self.digests = list(paths)
        self.load = image_loader(upright_first(transform), own_formats())

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        digest = self.digests[index]
        path = self.paths[digest]
        try:
            return digest, self.load(path)
        except InputError as error:
            return digest, str(error).removeprefix(f"{' '.join(str(path).split())} ")
        except Exception as error:  # one picture of thousands must not end the run: its reason is listed
            return digest, f"cannot be prepared ({' '.join(str(error).split()) or type(error).__name__})"


class _Features:
    """The features of an index, by digest: those of the generation before, and those computed now."""

    def __init__(self, path: Path, before: PictureIndex) -> None:
        self.path, self.shape = path, before.shape
        self.record_bytes = 2 * self.shape[0] * self.shape[1]
        self.old_file = path / f"vectors-{before.generation}.bin"
        old = {picture.digest: Entry(i, picture.crc) for i, picture in enumerate(before.pictures)}
        self.old = intact(self.old_file, self.record_bytes, old, "picture")
        if damaged := len(old) - len(self.old):
            print(f"{self.old_file}: {damaged} damaged pictures are computed again", flush=True)
        means = path / f"pooled-{before.generation}.bin"
        is_there = means.exists() and means.stat().st_size == 2 * self.shape[1] * len(before.pictures)
        self.is_whole = is_there and not damaged
        self.store = RecordStore(
            path / "new.bin", path / "new.txt", self.record_bytes, unit="picture", hexadecimal=False
        )
        self.new = self.store.intact(self.store.entries())

    def crcs(self) -> dict[str, int]:
        """The checksum of each picture's features."""
        return {digest: entry.crc for digest, entry in (self.old | self.new).items()}

    def missing(self, digests: dict[str, str]) -> dict[str, str]:
        """Of names with their digests: each digest without features, with the first name that has it."""
        found: dict[str, str] = {}
        for name, digest in digests.items():
            if digest not in self.old and digest not in self.new:
                found.setdefault(digest, name)
        return found

    def check_disk(self, missing: int, total: int) -> None:
        """Raise :class:`InputError` if ``missing`` new pictures, and then all ``total``, do not fit."""
        needed, free = (missing + total) * self.record_bytes, shutil.disk_usage(self.path).free
        if missing and needed > free:
            raise InputError(
                f"--index {self.path}: {total} pictures need {needed / 1e9:.2f} GB while the index is made, "
                f"and {free / 1e9:.2f} GB are free; free some, or choose an --index on another disk"
            )

    @torch.no_grad()
    def compute(
        self,
        missing: dict[str, str],
        folder: Path,
        retriever: Retriever,
        batch_size: int,
        num_workers: int,
    ) -> dict[str, str]:
        """Compute ``missing``, digest to name; return why some of them cannot be."""
        check_shared_memory(batch_size * pixel_bytes(retriever.model), num_workers)
        pictures = PictureDataset({d: folder / name for d, name in missing.items()}, retriever.transform)
        loader = SteadyLoader(pictures, batch_size, num_workers=num_workers, collate_fn=list)
        failed: dict[str, str] = {}
        first = 1 + max((entry.number for entry in self.new.values()), default=-1)
        bar = tqdm(total=len(missing), desc="Indexing", unit="picture")
        with self.store.append(first) as append, bar:
            for batch in loader:
                failed |= {digest: pixels for digest, pixels in batch if isinstance(pixels, str)}
                usable = {digest: pixels for digest, pixels in batch if not isinstance(pixels, str)}
                features = picture_features(retriever.model, list(usable.values()))
                records = [feature.contiguous().numpy().tobytes() for feature in features]
                entries = append(zip(usable, records, strict=True))
                self.new |= dict(zip(usable, entries, strict=True))
                bar.update(len(batch))
        return failed

    def write_generation(self, pictures: list[Picture], before: PictureIndex) -> int:
        """Write the files of ``pictures``, unless those that are there will do; return their number."""
        order = [picture.digest for picture in pictures]
        if order == [picture.digest for picture in before.pictures] and self.is_whole:
            return before.generation
        generation = before.generation + 1
        sources = [
            np.memmap(file, np.float16, "r", shape=(file.stat().st_size // self.record_bytes, *self.shape))
            if entries
            else None
            for file, entries in ((self.old_file, self.old), (self.store.values, self.new))
        ]

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, len(order), ROWS):
                part = order[start : start + ROWS]
                block = np.empty((len(part), *self.shape), np.float16)
                for row, digest in enumerate(part):
                    is_new = digest in self.new
                    source = sources[is_new]
                    assert source is not None  # it has entries
                    block[row] = source[(self.new if is_new else self.old)[digest].number]
                yield block

        def write(values: Callable[[np.ndarray], np.ndarray], file: BinaryIO) -> None:
            for block in blocks():
                file.write(values(block).tobytes())

        for kind, values in (("vectors", lambda block: block), ("pooled", mean_features)):
            write_atomically(self.path / f"{kind}-{generation}.bin", partial(write, values))
        return generation


def mean_features(block: np.ndarray) -> np.ndarray:
    """(G, Q, E) float16 features to their means (G, E), float16: what stands for a picture in FAISS."""
    return block.astype(np.float32).mean(axis=1).astype(np.float16)


def picture_features(model: Blip2QformerCirAlignPrompt, pixels: list[Tensor]) -> Tensor:
    """The features of B pictures (3, S, S) as targets: (B, Q, E) float16 on the CPU.

    Raises ``FloatingPointError`` if they are not finite.
    """
    if not pixels:
        return torch.empty(0)
    features = model.target_features(model.encode_image(torch.stack(pixels).to(model.device)))
    features = features.to("cpu", torch.float16)
    if not features.isfinite().all():
        raise FloatingPointError("features are not finite: the model's weights hold NaN or inf")
    return features
