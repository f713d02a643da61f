"""Rounds of a dialogue: each time the user takes the best picture found, and says what is still to change.

A round's query is its own reference and text. With averaging it is the mean of the query vectors of all
rounds so far: what was said before still counts.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sprc.data.split import Split, Triplet
from sprc.data.synthetic.dialogue import say, scenes_of
from sprc.distributed import from_main
from sprc.files import require_file_place, write_csv
from sprc.models.device import start_device
from sprc.models.model_path import with_files
from sprc.scoring.benchmarks import CIRR
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.ranking import mean_query, recall, score_blocks, target_ranks, top_k
from sprc.scoring.scorer import Scorer
from sprc.scoring.settings import DialogueSettings

WAYS = {"the last round": False, "the mean of the rounds": True}
CUTS = (1, 5, 10)

# What is said of an image to the user of a triplet: the triplet, the round from 0, the image's name.
Speaker = Callable[[Triplet, int, str], str]


def rank_rounds(
    split: Split,
    encoded: EncodedSplit,
    encode: Callable[[Split], EncodedSplit],
    speak: Speaker,
    *,
    rounds: int,
    average: bool,
) -> Tensor:
    """The rank of each query's target in each round of its dialogue, (R, T), from 0.

    The first round is the split's own. In each further one the reference is the best picture of the round
    before; the pictures that were references already are no candidates. A dialogue ends where the target
    comes first, and its later ranks are 0.

    Args:
        split: T triplets with known targets.
        encoded: its vectors.
        encode: from a split with the queries of a round, and with their references' images alone, to vectors.
        speak: what the user says in a round after the first.
        rounds: R.
        average: whether a round's query is the mean of the rounds' so far.
    """
    assert encoded.targets is not None  # the triplets' are known
    names = list(split.image_paths)
    seen = encoded.references[:, None]  # (T, r) gallery indices: the references so far
    said = [encoded.composed]
    ranks = torch.zeros(rounds, len(split.triplets), dtype=torch.int64)
    for number in range(rounds):
        if number:
            going = ranks[number - 1].nonzero()[:, 0].tolist()
            triplets = []
            for row in going:
                triplet, name = split.triplets[row], names[seen[row, -1]]
                caption = speak(triplet, number, name)
                triplets.append(Triplet(triplet.pair_id, name, None, caption))
            if not triplets:
                break
            images = {triplet.reference: split.image_paths[triplet.reference] for triplet in triplets}
            queries = said[0].clone()
            queries[going] = encode(replace(split, triplets=triplets, image_paths=images)).composed
            said.append(queries)
        query = mean_query(said) if average else said[-1]
        best = torch.empty(len(query), 1, dtype=torch.int64)
        for rows, scores in score_blocks(query, encoded.gallery):
            scores.scatter_(1, seen[rows], -torch.inf)
            ranks[number, rows] = target_ranks(scores, encoded.targets[rows])
            best[rows] = top_k(scores, 1)
        if number:
            ranks[number, ranks[number - 1] == 0] = 0
        seen = torch.cat([seen, best], dim=1)
    return ranks


def recall_of_rounds(ranks: Tensor) -> list[dict[str, float]]:
    """A row a round of (R, T) ranks: recall in percent, and that of the best rank so far."""
    best = ranks.cummin(dim=0).values
    return [
        {
            "round": number + 1,
            **{f"recall_at{k}": recall(ranks[number], k) for k in CUTS},
            **{f"best_recall_at{k}": recall(best[number], k) for k in CUTS},
        }
        for number in range(len(ranks))
    ]


def run_dialogue(settings: DialogueSettings) -> list[dict[str, Any]]:
    """Print and return recall after each round, by the last round alone and by the mean of all.

    With ``out`` it is written as well. Raises :class:`InputError` if the data are not the built-in ones.
    """
    settings.check()
    device = start_device(settings.device)
    if settings.out is not None:
        require_file_place("--out", settings.out)
    settings = with_files(settings)
    split_name = CIRR.split_name(settings.split)
    scenes = scenes_of(settings.data_path, split_name)
    benchmark = CIRR.load(settings.data_path, None, split_name, missing_images=settings.missing_images)
    (split,) = benchmark.splits
    scorer = Scorer.from_settings(settings, device)
    load = scorer.loader([split])

    def speak(triplet: Triplet, number: int, seen: str) -> str:
        assert triplet.target is not None
        rng = random.Random(f"{settings.seed} {triplet.pair_id} {number} {seen}")
        return say(scenes[seen], scenes[triplet.target], rng)

    rows = []
    with scorer.memory_explained():
        encoded = scorer.encode_one(split, load)
        for way, average in WAYS.items():
            ranks = rank_rounds(
                split,
                encoded,
                lambda part: scorer.encode_one(part, load),
                speak,
                rounds=settings.rounds,
                average=average,
            )
            rows += [{"query": way, **row} for row in recall_of_rounds(ranks)]
    return from_main(lambda: report(settings, split, rows))


def report(settings: DialogueSettings, split: Split, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the rows, and write them if asked to."""
    print(
        f"{len(split.triplets)} queries of {split.name}, recall in percent; a dialogue ends where its target "
        "comes first. `best`: of the best rank so far"
    )
    titles = {f"recall_at{k}": f"R@{k}" for k in CUTS} | {f"best_recall_at{k}": f"best R@{k}" for k in CUTS}
    print(f"{'query':<24}{'round':>6}" + "".join(f"{title:>11}" for title in titles.values()))
    for row in rows:
        print(f"{row['query']:<24}{row['round']:>6}" + "".join(f"{row[name]:>11.1f}" for name in titles))
    if settings.out is not None:
        write_csv(settings.out, rows)
        print(f"wrote {settings.out}")
    return rows
