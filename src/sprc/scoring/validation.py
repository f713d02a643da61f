"""Score a checkpoint on a split with targets (``blip_validate.py``)."""

from typing import Any

from sprc.distributed import from_main
from sprc.errors import InputError
from sprc.files import compact_json, require_file_place, write_atomically, write_csv
from sprc.models.device import start_device
from sprc.models.model_path import with_files
from sprc.scoring.benchmarks import Benchmark, benchmark_class
from sprc.scoring.ranking import Ranking
from sprc.scoring.reranking import Stages
from sprc.scoring.scorer import Scorer
from sprc.scoring.settings import ValidationSettings

TOP = 50


def run_validation(settings: ValidationSettings) -> dict[str, float | str]:
    """Print and return the metrics of a checkpoint.

    With ``save_rankings`` write each query's top 50, with ``save_ranks`` its target's ranks. With the
    settings of its training, the default, the figures of "val" are those that training wrote. With
    ``rerank`` all of it is of both stages, and ``rerank_top`` is to be that of the re-ranker's training.
    """
    settings.check_rerank()
    if settings.split != "val" and len(settings.rerank_weight) > 1:
        raise InputError("--rerank-weight: choose it on the validation split; give one for the test split")
    device = start_device(settings.device)
    for flag in ("save_ranks", "save_rankings"):
        file = getattr(settings, flag)
        if file is not None:
            require_file_place(f"--{flag.replace('_', '-')}", file)
    settings = with_files(settings)
    kind = benchmark_class(settings.dataset)
    benchmark = kind.load(
        settings.data_path,
        kind.protocol_of(settings),
        settings.split,
        missing_images=settings.missing_images,
    )
    scorer = Scorer.from_settings(settings, device)
    with scorer.memory_explained():
        stages = scorer.stages(benchmark.splits, settings)
        return from_main(lambda: report_scores(settings, benchmark, stages))


def report_scores(
    settings: ValidationSettings, benchmark: Benchmark, stages: Stages
) -> dict[str, float | str]:
    """Rank, print, and write what :func:`run_validation` is asked for."""
    rankings = chosen_rankings(settings, benchmark, stages)
    metrics = benchmark.metrics(rankings)
    for name, value in metrics.items():
        print(f"{name}: {value}")
    if settings.save_rankings:
        text = compact_json(named_rankings(benchmark, rankings))
        write_atomically(settings.save_rankings, lambda file: file.write(text))
        print(f"wrote {settings.save_rankings}")
    if settings.save_ranks:
        write_csv(settings.save_ranks, query_ranks(benchmark, rankings))
        print(f"wrote {settings.save_ranks}")
    return metrics


def chosen_rankings(settings: ValidationSettings, benchmark: Benchmark, stages: Stages) -> list[Ranking]:
    """The rankings to report. Of two stages both are printed, and the best of several weights is taken."""
    k = TOP if settings.save_rankings else None
    if stages.matches is None:
        return stages.rankings(k=k)
    print(f"first stage: {benchmark.summary(benchmark.metrics(stages.first_rankings()))}")
    found = {}
    for weight in settings.weights:
        rankings = stages.rankings(weight, k)
        metrics = benchmark.metrics(rankings)
        print(f"both, --rerank-weight {weight:g}: {benchmark.summary(metrics)}")
        found[weight] = (float(metrics[benchmark.headline]), rankings)
    best = max(found, key=lambda weight: found[weight][0])  # the first of equal ones
    if len(found) > 1:
        print(f"below: --rerank-weight {best:g}, which has the best {benchmark.headline}")
    return found[best][1]


def named_rankings(benchmark: Benchmark, rankings: list[Ranking]) -> list[dict[str, Any]]:
    """Each query with its best candidates, best first, as names."""
    result = []
    for split, ranking in zip(benchmark.splits, rankings, strict=True):
        assert ranking.top is not None  # it was asked for
        names = list(split.image_paths)
        for triplet, row in zip(split.triplets, ranking.top.tolist(), strict=True):
            entry = {"reference": triplet.reference, "caption": triplet.caption, "target": triplet.target}
            key = benchmark.ranking_key(split, triplet)
            result.append({**key, **entry, "ranking": [names[i] for i in row]})
    return result


def query_ranks(benchmark: Benchmark, rankings: list[Ranking]) -> list[dict[str, int | str]]:
    """The rank of each query's target, from 0: all that the metrics are made of.

    CIRR: `pairid`, `rank` in the gallery, `subset_rank` in the image set. FashionIQ: `type`, `number` of the
    entry in the type's captions file, `rank`. CIRCO: `id`, `rank` of the target that the caption was written
    for, and those of its other targets, `also_ranks`, with a space between two.
    """
    rows = []
    for split, ranking in zip(benchmark.splits, rankings, strict=True):
        lists = {name: ranks.tolist() for name, ranks in ranking.columns.items()}
        if ranking.also_ranks is not None:
            also = ranking.also_ranks.tolist()
            lists["also_ranks"] = [" ".join(str(rank) for rank in row if rank >= 0) for row in also]
        for number, triplet in enumerate(split.triplets):
            own = {name: ranks[number] for name, ranks in lists.items()}
            rows.append({**benchmark.query_key(split, triplet), **own})
    return rows
