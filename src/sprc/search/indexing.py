"""Make an index of a folder of pictures, or bring it up to date; see :mod:`sprc.search.index`.

    new.bin new.txt  what a run has computed, until it is finished: features, and a line each

Features are found by the bytes of the picture's file, so a renamed picture is not computed again and a
changed one is. A line in `new.txt` follows its features, so a killed run loses the batch it was at.
"""

import hashlib
import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sprc.data.datasets import SteadyLoader
from sprc.data.images import Transform, image_loader
from sprc.data.shared_memory import check_shared_memory
from sprc.errors import InputError
from sprc.files import hold_lock, named_write_errors, write_atomically, write_json
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.scoring.feature_cache import SETTLED_NS, cut_torn_line, pixel_bytes, read_record
from sprc.scoring.scorer import Scorer
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

# What Pillow decodes by itself. An EPS, for one, it hands to another program.
Image.init()
FORMATS = tuple(sorted({"AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN)))
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
ROWS = 1024  # pictures copied at once
# All that an index's folder may hold.
FILES = (
    *("index.json", "pictures.json", "vectors-*.bin", "pooled-*.bin"),
    *("new.bin", "new.txt", "lock", "lock.held", ".*.tmp"),
)


class Update(NamedTuple):
    """What a run of :func:`update_index` did, in pictures."""

    index: PictureIndex
    added: int
    changed: int
    removed: int
    computed: int


def search_transform(transform: Transform) -> Transform:
    """``transform`` of the picture as viewers show it: turned as its EXIF data say, which cameras write.

    Training and validation take pictures as they are stored, as SPRC does.
    """
    return partial(_transform_upright, transform=transform)


def _transform_upright(image: Image.Image, transform: Transform) -> Tensor:
    return transform(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; broken data say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of almost any kind, out of broken bytes
        return image


def update_index(
    path: Path,
    folder: Path,
    scorer: Scorer,
    identity: Identity,
    scored_as: dict[str, Any],
    *,
    rebuild: bool = False,
) -> Update:
    """Make the index at ``path`` one of the pictures that ``folder`` holds now, and return it.

    Computes what is new or changed, leaves out what cannot be read, drops what is gone. A killed run's
    features are used.

    Args:
        path: of the index; made if it is not there.
        folder: of pictures, at any depth. Links are followed only to files inside it; names that start
            with a dot are left out.
        scorer: the model on its device, with its settings.
        identity: of the model, see :func:`identity_of`.
        scored_as: `model_path`, `blip_model_name`, `backbone` and, if need be, `vocab` as they were given, to
            load it again.
        rebuild: throw away what is at ``path`` if it is of another folder or model, or damaged.

    Raises:
        InputError: ``folder`` holds no picture that can be read; ``path`` holds the index of another folder
            or model, or other files; the disk is too small.
        FloatingPointError: the model's features are not finite.
    """
    folder = folder.resolve()
    check_folder(folder)
    found, left_out = find_pictures(folder)
    if not found and not left_out:
        raise InputError(f"{folder} holds no picture ({' '.join(SUFFIXES)}); give a folder that does")
    shape = (scorer.checkpoint.model.config.num_query_tokens, scorer.checkpoint.model.config.embed_dim)
    described = {
        "format": FORMAT,
        "folder": str(folder),
        "identity": identity._asdict(),
        "scored_as": scored_as,
        "shape": shape,
    }
    _make_folder(path)
    waiting = f"waiting for another process that changes {path}"
    with hold_lock(path / "lock", waiting=waiting, unwritable="give an --index that can be written"):
        _prepare(path, folder, identity, scored_as, rebuild)
        write_json(path / "index.json", described)
        before = read_index(path, read_description(path))
        for file in path.glob(".*.tmp"):
            file.unlink()
        looks, digests = _look_at(folder, found, before, left_out)
        store = _Store(path, shape, before)
        missing: dict[str, str] = {}
        for name, digest in digests.items():
            if digest not in store.crcs:
                missing.setdefault(digest, name)
        store.check_disk(len(missing), len(digests))
        failed = store.compute(missing, folder, scorer) if missing else {}
        left_out |= {name: failed[digest] for name, digest in digests.items() if digest in failed}
        names = sorted(name for name, digest in digests.items() if digest not in failed)
        if not names:
            first = next(iter(sorted(left_out)))
            raise InputError(
                f"{folder}: none of {len(left_out)} pictures can be used; first: "
                f"{printable(first)}: {left_out[first]}"
            )
        pictures = [Picture(n, looks[n], digests[n], store.crcs[digests[n]]) for n in names]
        generation = before.generation
        order = [picture.digest for picture in pictures]
        if order != [picture.digest for picture in before.pictures] or not store.is_whole:
            generation += 1
            store.assemble(order, generation)
        contents = {
            "generation": generation,
            "pictures": pictures,
            "left_out": dict(sorted(left_out.items())),
        }
        text = json.dumps(contents).encode()
        # An index that stays as it is need not be read again by those who use it.
        if not (path / "pictures.json").exists() or (path / "pictures.json").read_bytes() != text:
            write_atomically(path / "pictures.json", lambda file: file.write(text))
        _sweep(path, generation)
        known = {picture.name: picture.digest for picture in before.pictures}
        return Update(
            read_index(path, read_description(path)),
            added=sum(name not in known for name in names),
            changed=sum(name in known and known[name] != digests[name] for name in names),
            removed=len(set(known) - set(names)),
            computed=len(missing) - len(failed),
        )


def check_folder(folder: Path) -> None:
    """Raise :class:`InputError` unless ``folder`` is one."""
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a folder of pictures")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")


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


def _prepare(path: Path, folder: Path, identity: Identity, scored_as: dict[str, Any], rebuild: bool) -> None:
    """Refuse an index of another folder or model, or with ``rebuild`` throw it away."""
    try:
        before = read_description(path)
        if before is not None:
            if before["folder"] != folder:
                raise InputError(
                    f"{path} is the index of {before['folder']}, not of {folder}; give another --index, "
                    "or add --rebuild to replace it"
                )
            refuse_other_model(path, before, identity, scored_as["model_path"])
            read_index(path, before)
    except InputError:
        if not rebuild:
            raise
        for file in _files(path) - {path / "lock", path / "lock.held"}:
            file.unlink(missing_ok=True)


def find_pictures(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the picture files below ``folder``, and those left out with the reason."""
    found, left_out = [], {}

    def unreadable(error: OSError) -> None:
        left_out[os.path.relpath(error.filename, folder)] = f"a folder that cannot be read ({error.strerror})"

    for top, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(top) / name).is_symlink():  # which os.walk does not follow
                left_out[os.path.relpath(Path(top) / name, folder)] = "a link to a folder, not followed"
        for name in files:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(top) / name
            relative = os.path.relpath(path, folder)
            try:
                mode = path.stat().st_mode
            except OSError as error:
                left_out[relative] = f"cannot be read ({error.strerror})"
                continue
            if not stat.S_ISREG(mode):
                left_out[relative] = "not a file"
            elif path.is_symlink() and not path.resolve().is_relative_to(folder):
                left_out[relative] = "a link that leads out of the folder"
            else:
                found.append(relative)
    return found, left_out


def _look_at(
    folder: Path, found: list[str], before: PictureIndex, left_out: dict[str, str]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """How each file looks, and the digest of its bytes; those that look as before are not read."""
    known = {picture.name: picture for picture in before.pictures}

    def look(name: str) -> tuple[list[int], str] | str:
        try:
            seen_at = time.time_ns()
            status = (folder / name).stat()
            looks = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if name in known and known[name].looks == looks:
                return looks, known[name].digest
            settled = seen_at - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
            return looks if settled else [], file_digest(folder / name)
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(look, found), "Looking at pictures", len(found), delay=1, unit="picture")
        seen = dict(zip(found, bar, strict=True))
    left_out |= {name: reason for name, reason in seen.items() if isinstance(reason, str)}
    fine = {name: value for name, value in seen.items() if not isinstance(value, str)}
    return {name: looks for name, (looks, _) in fine.items()}, {name: d for name, (_, d) in fine.items()}


def file_digest(path: Path) -> str:
    """A hash of the file's bytes; raises ``OSError``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class PictureDataset(Dataset):
    """Pictures to be indexed: an item is ``(digest, pixels)``, or ``(digest, why it cannot be used)``."""

    def __init__(self, paths: dict[str, Path], transform: Transform) -> None:
        self.paths = paths
        self.digests = list(paths)
        self.load = image_loader(search_transform(transform), FORMATS)

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


class _Store:
    """The features of an index, by digest: those of the generation before, and those computed now."""

    def __init__(self, path: Path, shape: tuple[int, int], before: PictureIndex) -> None:
        self.path = path
        self.shape = shape
        self.record_bytes = 2 * shape[0] * shape[1]
        self.old_file, self.new_file = path / f"vectors-{before.generation}.bin", path / "new.bin"
        old = {picture.digest: (i, picture.crc) for i, picture in enumerate(before.pictures)}
        self.old = self._verified(self.old_file, old)
        if damaged := len(old) - len(self.old):
            print(f"{self.old_file}: {damaged} damaged pictures are computed again", flush=True)
        means = path / f"pooled-{before.generation}.bin"
        is_there = means.exists() and means.stat().st_size == 2 * shape[1] * len(before.pictures)
        self.is_whole = is_there and not damaged
        self.new = self._verified(self.new_file, self._lines())
        self.crcs = {digest: crc for digest, (_, crc) in (self.old | self.new).items()}

    def _lines(self) -> dict[str, tuple[int, int]]:
        """Digest to record and checksum, of `new.txt`; a line that a kill cut short tells of nothing."""
        try:
            text = (self.path / "new.txt").read_bytes().decode("ascii", "replace")
        except FileNotFoundError:
            return {}
        found = {}
        for line in text.splitlines(keepends=True):
            fields = line.split()
            if len(fields) == 3 and line.endswith("\n") and fields[1].isdecimal() and fields[2].isdecimal():
                found[fields[0]] = (int(fields[1]), int(fields[2]))
        return found

    def _verified(self, file: Path, entries: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Those of ``entries`` whose features are in ``file`` as their checksum says."""

        def is_right(entry: tuple[int, int]) -> bool:
            values = read_record(file, entry[0], self.record_bytes)
            return len(values) == self.record_bytes and zlib.crc32(values) == entry[1]

        if not entries or not file.exists():
            return {}
        with ThreadPoolExecutor() as pool:
            checked = pool.map(is_right, entries.values())
            bar = tqdm(checked, "Verifying features", len(entries), delay=1, unit="picture")
            return {digest: entry for (digest, entry), ok in zip(entries.items(), bar, strict=True) if ok}

    def check_disk(self, missing: int, total: int) -> None:
        """Raise :class:`InputError` if ``missing`` new pictures, and then all ``total``, do not fit."""
        needed, free = (missing + total) * self.record_bytes, shutil.disk_usage(self.path).free
        if missing and needed > free:
            raise InputError(
                f"--index {self.path}: {total} pictures need {needed / 1e9:.2f} GB while the index is made, "
                f"and {free / 1e9:.2f} GB are free; free some, or choose an --index on another disk"
            )

    @torch.no_grad()
    def compute(self, missing: dict[str, str], folder: Path, scorer: Scorer) -> dict[str, str]:
        """Compute ``missing``, digest to name; return why some of them cannot be."""
        model, settings = scorer.checkpoint.model, scorer.settings
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if settings[name] < least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {settings[name]} is too small; the least is {least}")
        check_shared_memory(settings["batch_size"] * pixel_bytes(model), settings["num_workers"])
        pictures = PictureDataset({d: folder / name for d, name in missing.items()}, scorer.transform)
        loader = SteadyLoader(
            pictures,
            settings["batch_size"],
            num_workers=settings["num_workers"],
            collate_fn=list,
        )
        record = 1 + max((record for record, _ in self.new.values()), default=-1)
        failed: dict[str, str] = {}
        lines_file = self.path / "new.txt"
        with (
            named_write_errors(
                self.new_file, "What was computed is kept: the same command goes on from there"
            ),
            self.new_file.open("r+b" if self.new_file.exists() else "w+b") as vectors,
            lines_file.open("a+b") as lines,
            tqdm(total=len(missing), desc="Indexing", unit="picture") as bar,
        ):
            cut_torn_line(lines)
            for batch in loader:
                failed |= {digest: pixels for digest, pixels in batch if isinstance(pixels, str)}
                usable = [(digest, pixels) for digest, pixels in batch if not isinstance(pixels, str)]
                features = picture_features(model, [pixels for _, pixels in usable])
                for (digest, _), feature in zip(usable, features, strict=True):
                    values = feature.contiguous().numpy().tobytes()
                    crc = zlib.crc32(values)
                    vectors.seek(record * self.record_bytes)
                    vectors.write(values)
                    lines.write(f"{digest} {record} {crc}\n".encode())
                    self.new[digest], self.crcs[digest] = (record, crc), crc
                    record += 1
                vectors.flush()  # before its lines
                lines.flush()
                bar.update(len(batch))
        return failed

    def assemble(self, digests: list[str], generation: int) -> None:
        """Write the files of ``generation``: the features of ``digests`` in that order, and their means."""
        sources = [
            np.memmap(file, np.float16, "r", shape=(file.stat().st_size // self.record_bytes, *self.shape))
            if entries
            else None
            for file, entries in ((self.old_file, self.old), (self.new_file, self.new))
        ]

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, len(digests), ROWS):
                part = digests[start : start + ROWS]
                block = np.empty((len(part), *self.shape), np.float16)
                for row, digest in enumerate(part):
                    is_new = digest in self.new
                    block[row] = sources[is_new][(self.new if is_new else self.old)[digest][0]]
                yield block

        def write(values: Callable[[np.ndarray], np.ndarray], file: BinaryIO) -> None:
            for block in blocks():
                file.write(values(block).tobytes())

        for kind, values in (("vectors", lambda block: block), ("pooled", mean_features)):
            write_atomically(self.path / f"{kind}-{generation}.bin", partial(write, values))


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


def _sweep(path: Path, generation: int) -> None:
    """Remove what the finished index does not need."""
    needed = {path / f"{kind}-{generation}.bin" for kind in ("vectors", "pooled")}
    for pattern in ("vectors-*.bin", "pooled-*.bin", "new.txt", "new.bin"):
        for file in set(path.glob(pattern)) - needed:
            file.unlink(missing_ok=True)
