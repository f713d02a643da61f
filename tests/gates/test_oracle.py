"""Localisation can succeed: a fusion that is told the place reads 100 %, and what it makes finds the target.

The model is the shipped `tiny`, pre-trained and frozen, and nothing is trained here. One of its patches is
one cell of the scenes, so that a right map reads 100 % and not less.

What the recall shows: this backbone's tokens are local enough that making the edited patches the target's
makes the image the target, and that no other patches do. So an edit in the right place has something to win.
What it does not show: that a fusion can learn the place or the tokens, or that an untrained query, calls 1
and 2, reads them. The image is therefore compared as an image, by call 3, as the gallery is.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from helpers.oracle import OracleFusion
from torch import Tensor

from sprc.data.cirr import load_cirr
from sprc.data.edits import KINDS, PlacedEdit, read_edits
from sprc.data.images import load_image
from sprc.data.split import Split
from sprc.data.transforms import make_transform
from sprc.gates.localisation import edit_weights, localise, other_captions, shares
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.factory import create_model, model_class
from sprc.scoring.ranking import recall, target_ranks

SEED = 0
OF_A_KIND = 4  # queries
TRANSFORM = make_transform("targetpad", 96, 1.25)


class Seen(NamedTuple):
    """A split before the model. T queries, G images."""

    split: Split
    edits: list[PlacedEdit]
    tokens: Tensor  # (G, N, D)
    references: Tensor  # (T,)
    targets: Tensor  # (T,)
    patches: Tensor  # (T, P, P), True in the edited ones


@pytest.fixture(scope="module")
def model():
    return create_model(model_class("blip2_cir_align_prompt"), "tiny").eval().requires_grad_(False)


def placed(data, name):
    """A split of the built-in data, and its edits."""
    split = load_cirr(data, name)
    return split, read_edits(data / "cirr_dataset" / f"edits.{name}.json", split)


def see(model: Blip2QformerCirAlignPrompt, split: Split, edits: list[PlacedEdit]) -> Seen:
    rows = {name: row for row, name in enumerate(split.image_paths)}
    images = torch.stack([load_image(path, TRANSFORM) for path in split.image_paths.values()])
    weights = torch.stack([edit_weights(edit.cells, model.config.num_patches) for edit in edits])
    assert torch.allclose(weights, weights.round())  # a patch is a cell: all of it is edited or nothing
    references = torch.tensor([rows[triplet.reference] for triplet in split.triplets])
    targets = torch.tensor([rows[edit.target] for edit in edits])
    return Seen(split, edits, model.encode_image(images), references, targets, weights > 0.5)


@pytest.mark.parametrize(("right", "value"), [(True, 1.0), (False, 0.0)])
def test_a_right_map_reads_all_and_its_inverse_nothing_in_each_map_and_kind(data, model, right, value):
    """Attribution as well: what the oracle's query owes to the reference comes through the edited patches."""
    chosen, taken, paths = [], [], {}
    for name in ("train", "val", "test1"):
        split, edits = placed(data, name)
        paths |= split.image_paths
        for triplet, edit in zip(split.triplets, edits, strict=True):
            if sum(edit.kind == other.kind for other in taken) < OF_A_KIND:
                chosen.append(replace(triplet, target=edit.target))
                taken.append(edit)
    needed = dict.fromkeys(name for triplet in chosen for name in (triplet.reference, triplet.target))
    seen = see(model, Split("all", chosen, {name: paths[name] for name in needed}), taken)

    # Under another query's caption the oracle writes where that query's edit is. Two may have one caption, so
    # the queries are told by number.
    captions, others = [triplet.caption for triplet in chosen], other_captions(chosen, SEED)
    numbered = [replace(triplet, caption=str(row)) for row, triplet in enumerate(chosen)]
    elsewhere = seen.patches[[int(row) for row in other_captions(numbered, SEED)]]
    patches = torch.cat([seen.patches, elsewhere])
    model.gated_fusion = OracleFusion(
        model,
        seen.tokens[seen.references.repeat(2)],
        captions + others,
        seen.tokens[seen.targets.repeat(2)],
        patches if right else ~patches,
    )
    rows = localise(model, "fused", seen.split, taken, TRANSFORM, 16, SEED)

    kinds = {edit.kind for edit in taken}
    assert len(kinds) >= len(KINDS) - 1  # so small a data set has no query of one or another
    told = {(row["map"], row["kind"]) for row in rows if row["caption"] == "own"}
    assert told == {(name, kind) for name in ("gate", "change", "attribution") for kind in ("all", *kinds)}
    there = shares((elsewhere if right else ~elsewhere).double(), seen.patches.double())
    for row in rows:
        mine = torch.tensor([row["kind"] in ("all", edit.kind) for edit in taken])
        assert row["queries"] == mine.sum()
        if row["caption"] == "own":
            for column in ("share", "share_low", "share_high", "pointing", "pointing_low", "pointing_high"):
                assert row[column] == pytest.approx(value, abs=1e-6), (row["map"], row["kind"], column)
            areas = seen.patches[mine].double().mean(dim=(1, 2))
            assert row["ratio"] == pytest.approx((value / areas).mean().item(), abs=1e-5)
        if row["map"] == "gate":  # the other two do not weigh their patches alike
            share = there[mine].mean().item()
            column, expected = ("gain", value - share) if row["caption"] == "own" else ("share", share)
            assert row[column] == pytest.approx(expected, abs=1e-6)
    for row in rows:
        if row["kind"] == "all" and row["caption"] == "own":
            assert (row["gain"] > 0) == right  # how large it is, the other queries' places say


def test_on_a_finer_grid_a_right_map_reads_less_by_the_patches_that_cross_a_cell_s_edge():
    """ViT-g's 16 x 16 patches: a cell is 5 1/3 of them wide, and touches 6."""
    weights = torch.stack([edit_weights([cell], 16) for cell in ((0, 0), (1, 1), (2, 0))])
    touched, inside = (weights > 0).double(), (weights > 1 - 1e-9).double()
    assert shares(touched, weights).tolist() == pytest.approx(3 * [(16 / 18) ** 2])  # 79 %
    assert shares(inside, weights).tolist() == pytest.approx(3 * [1.0])


def test_recall_rises_with_the_edit_in_the_right_place_and_nowhere_else(data, model):
    """The image that the oracle makes, against the gallery; CIRR's ranking, without the reference."""
    seen = see(model, *placed(data, "val"))
    captions = [triplet.caption for triplet in seen.split.triplets]
    references, targets = seen.tokens[seen.references], seen.tokens[seen.targets]
    gallery, text = model.target_features(seen.tokens), model.tokenize(captions)
    found = {}
    for name, patches in (
        ("none", torch.zeros_like(seen.patches)),
        ("right", seen.patches),
        ("all others", ~seen.patches),
    ):
        model.gated_fusion = OracleFusion(model, references, captions, targets, patches)
        features = model.target_features(model.fuse(references, text).fused)
        # As an image alone is ranked: late interaction, averaged over the image's own features.
        scores = torch.einsum("tqe,gpe->tgqp", features, gallery).amax(dim=3).mean(dim=2)
        found[name] = target_ranks(scores, seen.targets, seen.references)
    assert recall(found["right"], 1) > 95  # 100
    for name in ("none", "all others"):
        assert recall(found[name], 1) < 20  # 5.6 each
        assert recall(found[name], 5) < 65  # 44 and 50
