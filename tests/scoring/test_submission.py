"""The size of a submission, at the size of CIRR's test1."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.scoring.encoding import EncodedSplit, member_indices
from sprc.scoring.recall import rank_split
from sprc.scoring.submission import write_submission

IMAGES = 2315


def submit(out, queries):
    """Write the submission of random features over a split with names of test1's form."""
    names = [f"test1-{number}-{number % 4}-img{number % 2}" for number in range(IMAGES)]
    triplets = []
    for number in range(queries):
        members = tuple(names[(number + step) % IMAGES] for step in range(6))
        triplets.append(Triplet(12_000 + number, members[0], None, "", members))
    index = {name: i for i, name in enumerate(names)}
    split = Split("test1", triplets, {name: Path(name) for name in names})
    generator = torch.Generator().manual_seed(0)
    encoded = EncodedSplit(
        gallery=F.normalize(torch.randn(IMAGES, 1, 4, generator=generator), dim=-1),
        composed=F.normalize(torch.randn(queries, 4, generator=generator), dim=-1),
        text_only=torch.zeros(queries, 4),
        references=torch.tensor([index[triplet.reference] for triplet in triplets]),
        targets=None,
        members=member_indices(split, index),
    )
    return write_submission(split, rank_split(split, encoded, k=50), out, "x", Path("data"))


def test_a_submission_of_test1_s_size_is_one_that_the_server_takes(tmp_path):
    recall, subset = submit(tmp_path, queries=4148)
    contents = json.loads(recall.read_text())
    assert len(contents) == 4148 + 2
    assert len(json.dumps(contents, indent=4)) > 5_000_000  # as it would be with indents
    assert 4_000_000 < recall.stat().st_size < 5_000_000
    assert subset.stat().st_size < 500_000


def test_a_submission_that_the_server_would_refuse_is_not_written(tmp_path):
    told = r"recall submission would have 5,\d{3},\d{3} bytes, .* at most 5,000,000; 5,400 queries of data "
    with pytest.raises(InputError, match=told):
        submit(tmp_path / "out", queries=5400)
    assert not (tmp_path / "out").exists()
