"""Rounds of a dialogue, and what the mean of their queries finds."""

import csv
from dataclasses import replace

import pytest
import torch
from helpers.runner import run
from torch.nn.functional import normalize

from sprc.data.split import Split, Triplet
from sprc.scoring.dialogue import rank_rounds, recall_of_rounds
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.ranking import mean_query

IMAGES, QUERIES, WIDTH, ROUNDS = 12, 30, 6, 4


def vector(*parts):
    """Of a query's words and reference, as if a model had made it."""
    generator = torch.Generator().manual_seed(hash(parts) % 2**31)
    return normalize(torch.randn(WIDTH, generator=generator), dim=-1)


def speak(triplet, number, seen):
    return str(1000 * triplet.pair_id + 100 * number + int(seen[5:]))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    names = [f"image{number}" for number in range(IMAGES)]
    drawn = torch.randint(IMAGES, (QUERIES, 2), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [(a, b if a != b else (b + 1) % IMAGES) for a, b in drawn]
    triplets = [Triplet(n, names[a], names[b], str(n), ()) for n, (a, b) in enumerate(drawn)]
    return Split("test1", triplets, {name: tmp_path_factory.getbasetemp() / name for name in names})


def encode(split):
    names = list(split.image_paths)
    gallery = torch.stack([vector(2, int(name[5:])) for name in names])[:, None]
    composed = torch.stack([vector(1, int(t.reference[5:]), int(t.caption)) for t in split.triplets])
    references = torch.tensor([names.index(t.reference) for t in split.triplets])
    known = [names.index(t.target) for t in split.triplets if t.target is not None]
    targets = torch.tensor(known) if len(known) == len(split.triplets) else None
    return EncodedSplit(gallery, composed, composed, references, targets, references[:, None][:, :0])


def plain(split, triplet, average):
    """One dialogue, in plain words."""
    gallery = {name: vector(2, int(name[5:])) for name in split.image_paths}
    best, before, said, ranks = None, [], [], []
    for number in range(ROUNDS):
        if ranks and ranks[-1] == 0:
            ranks.append(0)
            continue
        reference = triplet.reference if best is None else best
        text = triplet.caption if best is None else speak(triplet, number, best)
        before.append(reference)
        said.append(vector(1, int(reference[5:]), int(text)))
        query = sum(said) / len(said) if average else said[-1]
        order = sorted(
            (n for n in gallery if n not in before), key=lambda name: -(gallery[name] @ query).item()
        )
        ranks.append(order.index(triplet.target))
        best = order[0]
    return ranks


@pytest.mark.parametrize("average", [False, True])
def test_ranks_are_those_of_dialogues_held_one_by_one(split, average):
    sizes = []

    def noted(part):
        sizes.append((len(part.triplets), len(part.image_paths)))
        return encode(part)

    ranks = rank_rounds(split, encode(split), noted, speak, rounds=ROUNDS, average=average)
    assert ranks.T.tolist() == [plain(split, triplet, average) for triplet in split.triplets]
    going = [int((row > 0).sum()) for row in ranks[:-1]]
    assert [queries for queries, _ in sizes] == going  # none after its target was found
    assert all(images <= queries for queries, images in sizes)
    assert 0 < going[-1] < going[0] < QUERIES  # all cases are there


def test_a_dialogue_of_found_targets_asks_nothing_more(split):
    encoded = encode(split)
    found = replace(encoded, composed=encoded.gallery[encoded.targets, 0])
    ranks = rank_rounds(split, found, lambda _: pytest.fail("asked again"), speak, rounds=3, average=True)
    assert not ranks.any()


def test_the_mean_query_has_length_one_and_lies_between():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert mean_query([a, b]).allclose(torch.full((1, 2), 0.5**0.5))
    assert mean_query([a, a, b]).allclose(torch.tensor([[2.0, 1.0]]) / 5**0.5)
    assert mean_query([a]).equal(a)


def test_recall_is_of_the_round_and_of_the_best_so_far():
    rows = recall_of_rounds(torch.tensor([[3, 0, 20, 7], [6, 0, 4, 9]]))
    assert [row["round"] for row in rows] == [1, 2]
    assert [row["recall_at5"] for row in rows] == [50, 50]
    assert [row["best_recall_at5"] for row in rows] == [50, 75]
    assert [row["recall_at10"] for row in rows] == [75, 100]


@pytest.fixture(scope="module")
def printed(data, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("dialogue") / "rounds.csv"
    scored = ("--model-path", checkpoint, "--data-path", data, "--num-workers", 0)
    stdout, _ = run("check_dialogue.py", *scored, "--rounds", 2, "--out", out)
    with out.open(newline="", encoding="utf-8") as file:
        return stdout, list(csv.DictReader(file)), scored


def test_the_first_round_is_the_split_s_own(printed):
    stdout, rows, scored = printed
    assert "36 queries of test1" in stdout
    assert [(row["query"], row["round"]) for row in rows] == [
        (way, number) for way in ("the last round", "the mean of the rounds") for number in "12"
    ]
    validated, _ = run("blip_validate.py", "--dataset", "CIRR", "--split", "test1", *scored)
    figures = dict(line.split(": ", 1) for line in validated.splitlines() if line.startswith("recall_at"))
    for row in rows:
        if row["round"] == "1":
            for k in (1, 5, 10):
                assert row[f"recall_at{k}"] == row[f"best_recall_at{k}"] == figures[f"recall_at{k}"]
        assert float(row["best_recall_at5"]) >= float(row["recall_at5"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rounds", 0), "--rounds 0: give a whole number of at least 1"),
        (("--data-path", "nowhere"), "a dialogue needs the built-in data in CIRR's format"),
        (("--out", "nowhere/rounds.csv"), "--out nowhere/rounds.csv"),
    ],
)
def test_what_cannot_be_is_one_clear_line(printed, flags, said):
    _, stderr = run("check_dialogue.py", *printed[2], *flags, code=2)
    assert said in stderr
    assert stderr.count("\n") == 1
