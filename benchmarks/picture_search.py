"""Searching an index of pictures: growth with its size, and the page in a browser; see also engines.py."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from measure import (
    Row,
    Settings,
    in_bytes,
    in_seconds,
    is_noisy,
    keep_compiled,
    not_measured,
    peak_memory,
    ratio_row,
    require_memory,
    side_by_side,
    spread,
    turns,
    within,
)
from torch import Tensor

from sprc.search.index import FORMAT, open_index
from sprc.search.indexing import mean_features
from sprc.search.searcher import Searcher

SHAPES = {"ViT-g": (32, 256), "tiny": (4, 128)}
QUERIES = 50
TOP = 10
SOURCE = Path(__file__).resolve().parent.parent / "src"


def blocks_of_features(pictures: int, shape: tuple[int, int]) -> Iterator[Tensor]:
    """(B, Q, E) float16, normalised. Pictures lie in clusters of about 50, and the Q features of a picture
    near each other, as a model's do: features without any order would make every search alike hard."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(max(pictures // 50, 2), 1, shape[1], generator=generator), dim=-1)
    own = F.normalize(
        torch.randn(1, *shape, generator=generator), dim=-1
    )  # of each of the Q, of all pictures
    for start in range(0, pictures, 2048):
        count = min(2048, pictures - start)
        which = torch.randint(len(centres), (count,), generator=generator)
        noise = [
            torch.randn(count, n, shape[1], generator=generator) / shape[1] ** 0.5 for n in (1, shape[0])
        ]
        yield F.normalize(centres[which] + own + 0.7 * noise[0] + 0.7 * noise[1], dim=-1).half()


def write_index(path: Path, pictures: int, shape: tuple[int, int]) -> None:
    """An index of pictures that do not exist."""
    path.mkdir()
    with (path / "vectors-1.bin").open("wb") as vectors, (path / "pooled-1.bin").open("wb") as pooled:
        for block in blocks_of_features(pictures, shape):
            vectors.write(block.numpy().tobytes())
            pooled.write(mean_features(block.numpy()).tobytes())
    identity = {"model": "none", "transform": "targetpad", "target_ratio": 1.25}
    described = {"format": FORMAT, "folder": str(path), "identity": identity, "scored_as": {}, "shape": shape}
    entries = [[f"{i:06d}.jpg", [0, 0, 0, 0], f"{i:032x}", 0] for i in range(pictures)]
    (path / "index.json").write_text(json.dumps(described))
    (path / "pictures.json").write_text(json.dumps({"generation": 1, "pictures": entries, "left_out": {}}))


def queries_near(searcher: Searcher) -> Tensor:
    """(T, E) queries, each near one feature of a picture."""
    generator = torch.Generator().manual_seed(1)
    count, (tokens, width) = len(searcher.index.pictures), searcher.index.shape
    rows = torch.randint(count, (QUERIES,), generator=generator)
    of_each = torch.randint(tokens, (QUERIES,), generator=generator)
    near = searcher.index.gallery[rows, of_each].float()
    noise = torch.randn(QUERIES, width, generator=generator) / width**0.5
    return F.normalize(near + noise, dim=-1)


def one_search(path: Path, engine: str) -> Callable[[], object]:
    """A query of ``path``'s index, ready to run; each call takes the next one."""
    searcher = Searcher(open_index(path), None, engine)
    queries = queries_near(searcher)
    numbers = iter(range(10**9))
    return lambda: searcher.best(queries[next(numbers) % QUERIES], TOP, [0])


def growth(settings: Settings) -> list[Row]:
    """One exact query, and the memory of the whole process, from 1,000 to 100,000 pictures."""
    sizes = (200, 400) if settings.quick else (1000, 10_000, 100_000)
    require_memory(0.5 if settings.quick else 4)
    rows = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = {size: Path(folder) / str(size) for size in sizes}
            for size, path in paths.items():
                write_index(path, size, shape)
            times = side_by_side({size: one_search(path, "exact") for size, path in paths.items()}, settings)
            peaks = {n: peak_memory(one_search, path, "exact", device="cpu") for n, path in paths.items()}
        label = f"search, {name}'s shape {shape[0]} x {shape[1]}, exact"
        for size in sizes:
            last = size == sizes[-1]
            rows.append(
                Row(
                    f"{label}, {size} pictures: one query, memory of the process",
                    "4 GB or less" if last else "",
                    spread(times[size], in_seconds),
                    f"{in_bytes(peaks[size].whole)}, the mapped features among them",
                    within(peaks[size].whole, None, 4e9) if last else None,
                )
            )
        for size in sizes[1:]:
            rows.append(
                ratio_row(f"{label}, {size} / {sizes[0]} pictures: time", "", times[size], times[sizes[0]])
            )
    return rows


# --- the page


def page(settings: Settings) -> list[Row]:
    """The page in Chromium, on two cores, 1,008 pictures and the tiny model: first answer and later ones."""
    wanted = {
        "page, 1008 pictures: from opening an address with a query to its answer, first visit": 2.0,
        "page, 1008 pictures: from Enter to the next answer": 0.3,
    }
    missing = "" if shutil.which("chromium") else "Chromium is not here"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "Playwright is not installed"
    if missing:
        return [not_measured(name, f"{in_seconds(most)} or less", missing) for name, most in wanted.items()]
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    first, later = [], []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        data, models = make_demo(Path(folder), 1 if settings.quick else 28)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for _ in turns(settings, lambda: not is_noisy(first)):
            with running_app(data, models) as address:
                tab = browser.new_page(viewport={"width": 1280, "height": 1000})
                tab.goto("about:blank")
                start = time.perf_counter()
                tab.goto(f"{address}/?reference=dev-0-0-img0.png&text=make+the+circle+red")
                shown = tab.locator(".st-key-result-on-7 img")
                shown.wait_for()
                first.append(time.perf_counter() - start)
                for text in ("make the circle blue", "add a green star", "remove the square"):
                    tab.wait_for_timeout(500)
                    before = tab.locator(".st-key-result-ons").inner_text()
                    tab.get_by_label("What should change?").fill(text)
                    start = time.perf_counter()
                    tab.keyboard.press("Enter")
                    tab.wait_for_function(
                        "old => (document.querySelector('.st-key-result-ons')?.innerText || old) !== old",
                        arg=before,
                    )
                    later.append(time.perf_counter() - start)
                tab.close()
        browser.close()
    return [
        Row(
            name,
            f"{in_seconds(most)} or less",
            spread(times, in_seconds),
            "",
            within(median(times), None, most),
        )
        for (name, most), times in zip(wanted.items(), (first, later), strict=True)
    ]


def make_demo(folder: Path, families: int) -> tuple[Path, Path]:
    """What `make demo` leaves: data with 36 validation pictures a family, and a tiny model, not trained."""
    from sprc.data.split import triplets_of
    from sprc.models.checkpoint import save_checkpoint
    from sprc.models.factory import create_model, model_class
    from sprc.scoring.benchmarks import benchmark_class
    from sprc.training.resume import digest_of_data

    data, models = folder / "demo", folder / "models"
    sizes = ("--train-families", "1", "--val-families", str(families), "--test-families", "1")
    command = [sys.executable, SOURCE / "make_demo_data.py", "--out", data, *sizes]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    benchmark = benchmark_class("CIRR").load(data, None)
    triplets, _ = triplets_of(benchmark.train_splits(data))
    model = create_model(model_class("blip2_cir_align_prompt"), "tiny")
    saved = models / "clip_finetuned_on_cirr_tiny" / "saved_models"
    saved.mkdir(parents=True)
    told = {"backbone": "tiny", "blip_model_name": "blip2_cir_align_prompt", "num_workers": 0}
    told["digests"] = {"data_path": digest_of_data(benchmark.splits, triplets)}
    save_checkpoint(saved / "tuned_clip_arithmetic.pt", model, 0, told)
    return data, models


@contextmanager
def running_app(data: Path, models: Path) -> Iterator[str]:
    """The address of a page that nobody has visited yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        SOURCE / "app.py",
        "--port",
        port,
        "--data-path",
        data,
        "--models-path",
        models,
    ]
    environment = dict(os.environ)
    keep_compiled(environment, data.parent / "compiled")
    server = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                raise OSError(f"{command} ended with {server.returncode}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
