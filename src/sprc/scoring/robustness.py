"""Recall where queries are not as they were meant (``check_robustness.py``).

The gallery stays as it is: what people search does not change because they mistype. A row of the report is
one perturbation at one level, scored on all queries and compared with the clean queries one by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sprc.data.datasets import ImageDataset, SteadyLoader, batches_of_rank
from sprc.data.images import Loader, load_image
from sprc.data.perturbations import (
    OF_PICTURES,
    OF_TEXT,
    ChangedPicture,
    Perturbation,
    generator_of,
)
from sprc.data.shared_memory import check_shared_memory
from sprc.data.split import Split, Triplet
from sprc.distributed import from_main, sum_over_ranks
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.device import start_device
from sprc.models.model_path import folder_beside, with_files
from sprc.scoring.benchmarks import TrainingBenchmark, training_benchmark
from sprc.scoring.bootstrap import paired_bootstrap
from sprc.scoring.encoding import (
    EncodedSplit,
    eval_mode,
    prompts_of_batch,
    queries_by_reference,
)
from sprc.scoring.feature_cache import pixel_bytes
from sprc.scoring.ranking import Ranking
from sprc.scoring.recall import rank_modalities, rank_split
from sprc.scoring.robustness_report import Row, write_report
from sprc.scoring.scorer import Scorer
from sprc.scoring.settings import RobustnessSettings

CLEAN, HALVES = "clean", ("text only", "image only")
RESAMPLES = 2000
EITHER = "either half"  # each query by the half that ranks its target better


def run_robustness(settings: RobustnessSettings) -> list[Row]:
    """Score the checkpoint on clean and on changed queries; print the table, write it and the plot.

    Raises :class:`InputError` before any long work.
    """
    known = (*OF_TEXT, *OF_PICTURES)
    if unknown := [name for name in settings.perturbations if name not in known]:
        raise InputError(f"--perturbations {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    device = start_device(settings.device)
    given = settings.model_path
    settings = with_files(settings)
    benchmark = training_benchmark(settings.dataset).load(
        settings.data_path,
        settings.fiq_protocol,
        settings.split,
        missing_images=settings.missing_images,
    )
    out = settings.out or folder_beside(given, settings.model_path) / "robustness"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    scorer = Scorer.from_settings(settings, device)
    from_main(lambda: make_folder(out))
    with scorer.memory_explained():
        rows = measure(scorer, benchmark, settings.perturbations, settings.seed)
    from_main(lambda: write_report(out, rows, benchmark, scorer.checkpoint, settings))
    return rows


def make_folder(out: Path) -> None:
    """Make the folder of the report; :class:`InputError` where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error}); choose another folder") from error


def measure(scorer: Scorer, benchmark: TrainingBenchmark, names: Iterable[str], seed: int) -> list[Row]:
    """The rows of the report: the clean queries, their halves, and each perturbation of ``names``.

    Several ranks share the encoding, and rank for themselves; all get the rows.
    """
    model, splits = scorer.checkpoint.model, benchmark.splits
    load = scorer.loader(splits)
    check_shared_memory(scorer.reading["batch_size"] * pixel_bytes(model), scorer.reading["num_workers"])
    encoded = [scorer.encode_one(one, load) for one in splits]
    halves = [rank_modalities(split, one) for split, one in zip(splits, encoded, strict=True)]
    clean, *alone = ([found[name] for found in halves] for name in halves[0])
    scores = query_scores(benchmark, clean)
    strata = np.repeat(np.arange(len(splits)), [len(split.triplets) for split in splits])

    def row(group: str, change: str, level: float, told: str, rankings: list[Ranking]) -> Row:
        differences = query_scores(benchmark, rankings) - scores
        found = paired_bootstrap(differences[None], strata, resamples=RESAMPLES)
        difference = (found.difference, found.low, found.high)
        return Row(group, change, level, told, benchmark.metrics(rankings), difference)

    rows = [Row("query", CLEAN, 0.0, "", benchmark.metrics(clean), None)]
    rows += [row("query", name, 0.0, "", found) for name, found in zip(HALVES, alone, strict=True)]
    rows.append(row("query", EITHER, 0.0, "", [*map(better_half, *alone)]))

    chosen = set(names)
    of_text = [(name, level) for name, one in OF_TEXT.items() if name in chosen for level in one.levels]
    changed = [
        compose_texts(model, split, load, changed_captions(split, of_text, seed), **scorer.reading)
        for split in (splits if of_text else ())
    ]
    for number, (name, level) in enumerate(of_text):
        queries = [composed[number] for composed in changed]
        rows.append(
            row("text", name, level, OF_TEXT[name].in_words(level), rank_queries(splits, encoded, queries))
        )
    of_pictures = [(n, level) for n, one in OF_PICTURES.items() if n in chosen for level in one.levels]
    for name, level in tqdm(of_pictures, desc="pictures", unit="level"):
        perturbation = OF_PICTURES[name]
        queries = []
        for split in splits:
            pictures = ChangedReferences(split, scorer, name, perturbation, level, seed)
            queries.append(compose_pictures(model, split, pictures, **scorer.reading))
        rankings = rank_queries(splits, encoded, queries)
        rows.append(row("picture", name, level, perturbation.in_words(level), rankings))
    return rows


def query_scores(benchmark: TrainingBenchmark, rankings: Sequence[Ranking]) -> np.ndarray:
    """What each query adds to the headline metric, (T of all splits,), in percent."""
    columns = [{name: ranks.numpy() for name, ranks in one.columns.items()} for one in rankings]
    return np.concatenate([benchmark.headline_scores(ranks) for ranks in columns])


def better_half(text: Ranking, image: Ranking) -> Ranking:
    """The ranks of each query by the half that ranks its target better: what either half can answer."""
    pairs = {name: (getattr(text, name), getattr(image, name)) for name in ("ranks", "set_ranks")}
    return Ranking(**{name: torch.minimum(*both) for name, both in pairs.items() if both[0] is not None})


def rank_queries(
    splits: Sequence[Split], encoded: Sequence[EncodedSplit], queries: Sequence[Tensor]
) -> list[Ranking]:
    """The rankings of each split's composed queries (T, E) in its clean gallery."""
    parts = zip(splits, encoded, queries, strict=True)
    return [rank_split(split, replace(one, composed=composed)) for split, one, composed in parts]


def query_id(split: Split, number: int) -> str:
    """What tells a query from all others of its benchmark, whatever its split is without."""
    triplet = split.triplets[number]
    return f"{split.dress_type} {triplet.pair_id}".strip()


def changed_captions(split: Split, changes: Sequence[tuple[str, float]], seed: int) -> list[list[str]]:
    """The captions of all queries under each of ``changes``, names and levels of text perturbations."""
    return [
        [
            OF_TEXT[name].change(
                triplet.caption, generator_of(seed, name, level, query_id(split, number)), level
            )
            for number, triplet in enumerate(split.triplets)
        ]
        for name, level in changes
    ]


@torch.no_grad()
def compose_texts(
    model: Blip2QformerCirAlignPrompt,
    split: Split,
    load: Loader,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int,
    num_workers: int,
) -> Tensor:
    """The composed queries under other captions, each reference read once for all of them.

    Batches are those of :func:`encode_split`, so that what a caption's change does not change is the same to
    the bit.

    Args:
        model: on its device.
        split: the queries.
        load: reads an image by its path.
        captions: V times one for each of the T queries.
        batch_size: images, and queries, at once.
        num_workers: processes that read images.

    Returns:
        (V, T, E), on the CPU.
    """
    names = list(split.image_paths)
    index = {name: number for number, name in enumerate(names)}
    variants = [
        queries_by_reference(replace(split, triplets=with_captions(split, texts)), index)
        for texts in captions
    ]
    found = torch.zeros(len(captions), len(split.triplets), model.config.embed_dim)
    referred = {index[triplet.reference] for triplet in split.triplets}
    own = [batch for batch in batches_of_rank(len(names), batch_size) if not referred.isdisjoint(batch)]
    images = ImageDataset(names, split.image_paths, load)
    loader = SteadyLoader(images, batch_sampler=own, num_workers=num_workers)
    with eval_mode(model):
        for indices, batch in tqdm(loader, desc=f"texts of {split.title}", leave=False):
            embeds = model.encode_image(batch.to(model.device))
            keys = model.Qformer.bert.image_keys(embeds)
            for composed, queries_of in zip(found, variants, strict=True):
                parts = prompts_of_batch(model, indices, embeds, keys, queries_of, batch_size)
                for numbers, text, prompts in parts:
                    composed[numbers] = model.query_of(prompts, text).cpu()
    return sum_over_ranks(found)


def with_captions(split: Split, captions: Sequence[str]) -> list[Triplet]:
    """The split's triplets with other captions."""
    return [replace(t, caption=caption) for t, caption in zip(split.triplets, captions, strict=True)]


class ChangedReferences(Dataset):
    """The reference of each query as its perturbation leaves it: ``(number, (3, S, S))``.

    Raises :class:`InputError` for an image that cannot be read.
    """

    def __init__(
        self, split: Split, scorer: Scorer, name: str, perturbation: Perturbation, level: float, seed: int
    ) -> None:
        self.split, self.name, self.level, self.seed = split, name, level, seed
        self.change = ChangedPicture(scorer.transform, perturbation, level)

    def __len__(self) -> int:
        return len(self.split.triplets)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        generator = generator_of(self.seed, self.name, self.level, query_id(self.split, number))
        path = self.split.image_paths[self.split.triplets[number].reference]
        return number, load_image(path, lambda picture: self.change(picture, generator))


@torch.no_grad()
def compose_pictures(
    model: Blip2QformerCirAlignPrompt,
    split: Split,
    pictures: Dataset[tuple[int, Tensor]],
    *,
    batch_size: int,
    num_workers: int,
) -> Tensor:
    """The composed queries (T, E), on the CPU, with ``pictures`` for references: one for each query."""
    found = torch.zeros(len(split.triplets), model.config.embed_dim)
    own = batches_of_rank(len(split.triplets), batch_size)
    loader = SteadyLoader(pictures, batch_sampler=own, num_workers=num_workers)
    with eval_mode(model):
        for numbers, images in tqdm(loader, desc=f"pictures of {split.title}", leave=False):
            text = model.tokenize([split.triplets[number].caption for number in numbers.tolist()])
            prompts = model.prompts_of(model.encode_image(images.to(model.device)), text)
            found[numbers] = model.query_of(prompts, text).cpu()
    return sum_over_ranks(found)
