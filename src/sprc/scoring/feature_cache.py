"""A frozen vision transformer's tokens, computed once an image and kept on disk.

The transformer and the preprocessing give the same tokens in every epoch, so training, validation and
submission may read them in place of images. What is kept is the output before ln_vision, which is trained.

A cache folder holds a folder a key. The key covers all that the tokens depend on but the image itself: the
transformer's weights, the precision it runs in, the preprocessing, the type they are stored in.

    key.json     what the key stands for
    tokens.bin   records of (N, D) values, back to back
    index.txt    a line a record: digest of the image file's bytes, record number, checksum of the record
    files.json   image files that were looked at: size, times, inode, digest

A record is found by the image's bytes, so a changed image is computed again and a renamed one is not.
Readers map the pages of the records they ask for, and nothing else; any number of processes may read at once.
One at a time fills, under a lock. Its lines follow its records, so a killed one loses the batch it was at.
Ranks that torchrun started share the looking, the verifying and the computing; rank 0 alone writes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from sprc.data.datasets import ImageDataset, SteadyLoader, batches_of_rank
from sprc.data.images import Loader, check_images, image_loader
from sprc.data.shared_memory import check_shared_memory
from sprc.data.transforms import make_transform
from sprc.distributed import from_main, objects_of_all_ranks, rank, wait_for_all, world_size
from sprc.errors import InputError
from sprc.files import READ_ONLY, compact_json, hold_lock, look_at_file, write_atomically, write_json
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.device import memory_explained
from sprc.models.digests import weights_digest
from sprc.records import RecordStore

FORMAT = 1
UNWRITABLE = "fill it where it can be written (extract_features.py), or give another folder"


def open_images(
    model: Blip2Qformer,
    preprocessing: dict[str, Any],
    paths: Iterable[Path],
    *,
    feature_cache: Path | None,
    cache_dtype: str,
    batch_size: int,
    num_workers: int,
    read_at_once: int | None = None,
) -> Loader:
    """What reads the images at ``paths``, all looked at before: pixels, or tokens from a filled cache.

    Args:
        model: on its device.
        preprocessing: `transform` and `target_ratio` as for ``make_transform``.
        paths: the images that will be asked for.
        feature_cache: the cache's folder; None reads pixels.
        cache_dtype: see :class:`FeatureCache`.
        batch_size: images at once, where they have to be computed.
        num_workers: processes that read them.
        read_at_once: images in a batch that this rank then reads through what is returned; by default
            ``batch_size``.

    Raises:
        InputError: an image cannot be used, or the cache cannot; see :class:`FeatureCache`. Or the shared
            memory is too small for ``num_workers``, see :func:`check_shared_memory`.
    """
    require_reading(batch_size, num_workers)
    transform = make_transform(
        preprocessing["transform"], model.config.image_size, preprocessing["target_ratio"]
    )
    paths = list(paths)
    read_at_once = batch_size if read_at_once is None else read_at_once
    if feature_cache is None:
        check_shared_memory(read_at_once * pixel_bytes(model), num_workers)
        check_images({str(path): path for path in paths}, map(str, paths))
        return image_loader(transform)
    cache = FeatureCache(feature_cache, model, preprocessing, cache_dtype)
    check_shared_memory(read_at_once * cache.record_bytes, num_workers)
    with memory_explained(model.device, batch_size, ["a smaller --batch-size"]):
        computed = cache.fill(paths, model, transform, batch_size=batch_size, num_workers=num_workers)
    print(f"feature cache {cache.folder}: {len(cache.records)} images, {computed} of them new", flush=True)
    return cache


def require_reading(batch_size: int, num_workers: int) -> None:
    """Raise :class:`InputError` where no image could be read with these."""
    for name, value, least in (("batch-size", batch_size, 1), ("num-workers", num_workers, 0)):
        if value < least:
            raise InputError(f"--{name} {value} is too small; the least is {least}")


def pixel_bytes(model: Blip2Qformer) -> int:
    """What the model's input of one image takes: float32, (3, S, S)."""
    return 3 * 4 * model.config.image_size**2


class FeatureCache:
    """Reads the tokens of an image file, (N, D) in the stored type: ``cache(path)``, after :meth:`fill`.

    Args:
        folder: of all keys; made if it is not there.
        model: on its device, its weights as they will be used.
        preprocessing: `transform` and `target_ratio` as for ``make_transform``.
        dtype: "float16", "bfloat16" or "float32".

    Raises:
        InputError: the vision transformer is trained, so that its tokens change; or the folder is not
            a feature cache's, or not the same one on all ranks.
    """

    def __init__(self, folder: Path, model: Blip2Qformer, preprocessing: dict[str, Any], dtype: str) -> None:
        config = model.config
        if not config.freeze_vit:
            raise InputError(
                f"--feature-cache {folder}: this model's vision transformer is trained, so its tokens change "
                "with every step; leave the flag out, or freeze it (--freeze-vit)"
            )
        self.dtype = getattr(torch, dtype)
        self.shape = (config.num_patches**2 + 1, config.vit_width)
        self.record_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        if preprocessing["transform"] == "squarepad":  # which has no ratio
            preprocessing = {**preprocessing, "target_ratio": None}
        key = {
            "format": FORMAT,
            "vision_transformer": weights_digest(model.visual_encoder.state_dict()),
            "computed_in": "float16" if model.device.type == "cuda" else "float32",
            **preprocessing,
            "image_size": config.image_size,
            "shape": list(self.shape),
            "dtype": dtype,
        }
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        described = self.folder / "key.json"
        try:
            if rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not described.exists():
                    write_json(described, key)
        except OSError as error:
            if error.errno in READ_ONLY:
                raise InputError(
                    f"--feature-cache {folder}: it holds nothing for this model and preprocessing, and "
                    f"cannot be written ({os.strerror(error.errno)}); {UNWRITABLE}"
                ) from error
            raise InputError(f"--feature-cache: {self.folder} cannot be used ({error}); remove it") from error
        wait_for_all()
        if rank() and not described.exists():
            raise InputError(
                f"--feature-cache {folder}: rank {rank()} does not see what rank 0 wrote there; give a "
                "folder on a disk that all machines share"
            )
        try:
            if json.loads(described.read_text(encoding="utf-8")) != json.loads(text):
                raise ValueError("key.json tells of another key")
        except (OSError, ValueError) as error:
            raise InputError(f"--feature-cache: {self.folder} cannot be used ({error}); remove it") from error
        self.store = RecordStore(
            self.folder / "tokens.bin",
            self.folder / "index.txt",
            self.record_bytes,
            unit="image",
            hexadecimal=True,
        )
        self.records: dict[Path, int] = {}  # what fill has verified

    def __call__(self, path: Path) -> Tensor:
        """The tokens (N, D) of the image at ``path``, which :meth:`fill` was given."""
        # Mapped for this record alone and copied: what a process keeps in memory does not grow.
        record = np.memmap(
            self.store.values, np.uint8, "r", self.records[path] * self.record_bytes, (self.record_bytes,)
        )
        return torch.from_numpy(np.array(record)).view(self.dtype).view(self.shape)

    def fill(
        self,
        paths: Iterable[Path],
        model: Blip2Qformer,
        transform: Callable[[Image], Tensor],
        *,
        batch_size: int,
        num_workers: int,
    ) -> int:
        """Make the tokens of ``paths`` available; return how many images were computed.

        What is there is verified by its checksums first. A killed filling goes on where it was.

        Raises:
            InputError: an image cannot be read; a token does not fit into the stored type; or the disk is
                too small, which is known before the first image is computed.
        """
        paths = list(dict.fromkeys(paths))
        digests = self._digests(paths)
        found = self._verified(set(digests.values()))
        computed = 0
        if set(digests.values()) - set(found):
            with self._lock(len(set(digests.values()) - set(found))):
                # Another process may have filled it while this one waited.
                found |= self._verified(set(digests.values()) - set(found))
                missing = {digest: path for path, digest in digests.items() if digest not in found}
                computed = len(missing)
                if missing:
                    self._check_disk(computed)
                    check_images({str(path): path for path in missing.values()}, map(str, missing.values()))
                    found |= self._compute(missing, model, transform, batch_size, num_workers)
        self.records |= {path: found[digest] for path, digest in digests.items()}
        return computed

    def _compute(
        self,
        missing: dict[str, Path],
        model: Blip2Qformer,
        transform: Callable[[Image], Tensor],
        batch_size: int,
        num_workers: int,
    ) -> dict[str, int]:
        """Compute, append and return the records of ``missing``, {digest: path}.

        A batch is computed by the rank whose turn it is; rank 0 takes them in their order and writes.
        """
        check_shared_memory(batch_size * pixel_bytes(model), num_workers)
        digests, paths = list(missing), list(missing.values())
        names = [str(path) for path in paths]
        images = ImageDataset(names, dict(zip(names, paths, strict=True)), image_loader(transform))
        loader = SteadyLoader(
            # A generator of its own: filled or not, the cache leaves a training's random numbers alone.
            images,
            batch_sampler=batches_of_rank(len(paths), batch_size),
            num_workers=num_workers,
            generator=torch.Generator(),
        )
        first = from_main(self.store.next_number)
        records = {digest: first + number for number, digest in enumerate(digests)}
        computed = (model.vit_tokens(batch.to(model.device)).to(self.dtype).cpu() for _, batch in loader)
        with torch.no_grad():
            if rank():
                for tokens in computed:
                    dist.send(tokens.contiguous().view(torch.uint8), 0)
            else:
                self._write(paths, digests, first, self._in_turns(len(paths), batch_size, computed))
        wait_for_all()
        return records

    def _in_turns(self, images: int, batch_size: int, own: Iterator[Tensor]) -> Iterator[Tensor]:
        """The tokens of each batch in their order, this rank's own and what the others send: (b, N, D)."""
        for number, start in enumerate(range(0, images, batch_size)):
            sender = number % world_size()
            if sender == 0:
                yield next(own)
            else:
                count, (rows, width) = min(batch_size, images - start), self.shape
                received = torch.empty(count, rows, width * self.dtype.itemsize, dtype=torch.uint8)
                dist.recv(received, sender)
                yield received.view(self.dtype)

    def _write(self, paths: list[Path], digests: list[str], first: int, batches: Iterator[Tensor]) -> None:
        """Append the records of ``paths``, from number ``first`` on, batch by batch."""

        def checked(start: int, tokens: Tensor) -> Iterator[tuple[str, bytes]]:
            for number, record in enumerate(tokens, start):
                if not record.isfinite().all():
                    raise InputError(
                        f"{paths[number]}: a token of the vision transformer does not fit into "
                        f"{str(self.dtype).removeprefix('torch.')}; use --cache-dtype bfloat16 or float32"
                    )
                yield digests[number], record.contiguous().view(torch.uint8).numpy().tobytes()

        bar = tqdm(total=len(paths), desc="Extracting features", unit="image")
        with bar, self.store.append(first) as append:
            written = 0
            for tokens in batches:
                append(checked(written, tokens))
                written += len(tokens)
                bar.update(len(tokens))

    def _verified(self, digests: set[str]) -> dict[str, int]:
        """The records of those of ``digests`` that are there and whose checksum is right.

        Each rank verifies its share.
        """
        entries = {digest: entry for digest, entry in self.store.entries().items() if digest in digests}
        own = dict(list(entries.items())[rank() :: world_size()])
        parts = objects_of_all_ranks({d: entry.number for d, entry in self.store.intact(own).items()})
        found = {digest: record for part in parts for digest, record in part.items()}
        if damaged := len(entries) - len(found):
            print(f"{self.folder}: {damaged} damaged records are computed again", flush=True)
        return found

    def _digests(self, paths: list[Path]) -> dict[Path, str]:
        """A digest of each file's bytes. A file that looks as it did when it was read is not read again.

        Each rank reads its share.
        """
        file = self.folder / "files.json"
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            known = {}

        def look(path: Path) -> tuple[list[int], str]:
            before = known.get(str(path.absolute()))
            try:
                return look_at_file(path, (before[:4], before[4]) if isinstance(before, list) else None)
            except FileNotFoundError as error:
                raise InputError(f"{path} is missing; restore it, or correct --data-path") from error
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error}); restore it from a copy") from error

        own = paths[rank() :: world_size()]
        with ThreadPoolExecutor() as pool:
            bar = tqdm(pool.map(look, own), "Looking at images", len(own), delay=1, unit="image")
            parts = objects_of_all_ranks(dict(zip(own, bar, strict=True)))
        of_path = {path: value for part in parts for path, value in part.items()}
        found = {path: of_path[path] for path in paths}
        entries = {str(path.absolute()): [*looks, value] for path, (looks, value) in found.items() if looks}
        if any(known.get(name) != entry for name, entry in entries.items()):
            text = compact_json(known | entries)
            try:
                write_atomically(file, lambda opened: opened.write(text))
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                print(
                    f"{self.folder} cannot be written: images are read at every start to know them",
                    flush=True,
                )
        return {path: value for path, (_, value) in found.items()}

    def _check_disk(self, images: int) -> None:
        """Raise :class:`InputError` if ``images`` more records do not fit on the disk."""
        needed, free = images * self.record_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"--feature-cache {self.folder.parent}: {images} images need {needed / 1e9:.2f} GB "
                f"({self.record_bytes / 1e6:.2f} MB each), and {free / 1e9:.2f} GB are free; free some, or "
                "choose a folder on another disk"
            )

    @contextmanager
    def _lock(self, missing: int) -> Iterator[None]:
        """Hold the right to fill in ``missing`` images. Of several ranks rank 0 holds it."""
        if rank():
            wait_for_all()
            yield
            return
        waiting = f"waiting for another process that fills {self.folder}"
        unwritable = f"{missing} images are missing in it: {UNWRITABLE}"
        with hold_lock(self.folder / "lock", waiting=waiting, unwritable=unwritable):
            wait_for_all()
            yield
