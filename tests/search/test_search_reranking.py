"""A re-ranker looks again at what a search finds: the order of both stages, and what is refused."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from helpers.searching import TEXT, make_index, query, save_model, save_reranker

from sprc.data.images import load_image
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.models.checkpoint import load_checkpoint
from sprc.search import reranking
from sprc.search.index import open_index
from sprc.search.reranking import KeptTokens
from sprc.search.searcher import Searcher

NAME = "a/dev-0-0-img0.png"


@pytest.fixture(scope="module")
def reranker(checkpoint, tmp_path_factory):
    """Its file, and the model itself."""
    path = tmp_path_factory.mktemp("reranker") / "reranker.pt"
    return path, save_reranker(path, checkpoint)


@pytest.fixture(scope="module")
def open_with(picture_index, reranker):
    """Open the index with the re-ranker and these settings."""
    return lambda **settings: Searcher.open(picture_index, device="cpu", rerank=reranker[0], **settings)


@pytest.fixture(scope="module")
def first_stage(picture_index):
    """All pictures but the reference, as the first stage has them."""
    return Searcher.open(picture_index, device="cpu").search(NAME, TEXT, top=100)


@pytest.fixture(scope="module")
def brute_force(checkpoint, pictures, reranker, first_stage):
    """Similarity and match of each picture, by its name: from files, a picture at a time."""
    transform = make_transform("targetpad", 96, 1.25)
    first, second = load_checkpoint(checkpoint).model, reranker[1]

    @torch.no_grad()
    def scores(strength=1.0):
        reference = first.encode_image(load_image(pictures / NAME, transform)[None])
        text = first.tokenize([TEXT])
        prompts = first.prompts_of(reference, text, strength)
        vector = first.query_of(prompts, text)[0]
        found = {}
        for name in (result.name for result in first_stage):
            pixels = load_image(pictures / name, transform)[None]
            features = first.target_features(first.encode_image(pixels))[0].half().float()  # as indexed
            beside = second.beside(prompts.half(), [TEXT])  # as validation keeps them
            match = second.match(second.encode_image(pixels), beside)
            found[name] = (max((vector @ feature).item() for feature in features), match.item())
        return found, first.temp.item()

    return scores


def names_of(results):
    return [result.name for result in results]


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_terminal_has_the_order_of_brute_force(
    picture_index, reranker, brute_force, pictures, first_stage, capsys, weight
):
    scores, temp = brute_force()

    def both(name):
        similarity, match = scores[name]
        return weight * match + (1 - weight) * similarity / temp

    expected = sorted(scores, key=lambda name: -both(name))
    assert expected != names_of(first_stage)
    gaps = [both(a) - both(b) for a, b in pairwise(expected)]
    assert min(gaps) > 1e-5  # nothing below hangs on the last bit
    query(picture_index, top=9, json=True, rerank=reranker[0], rerank_weight=[weight])
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["results"]
    assert [row["path"] for row in rows] == [str(pictures / name) for name in expected[:9]]
    for row, name in zip(rows, expected, strict=False):
        assert (row["score"], row["match"]) == pytest.approx(scores[name], abs=1e-5)
    assert "; re-ranked 35 in " in printed.err


def test_lines_say_both_scores_and_a_dash_for_what_was_not_looked_at(
    open_with, picture_index, reranker, capsys
):
    query(picture_index, top=4, rerank=reranker[0], rerank_top=2)
    found = open_with(rerank_top=2).search(NAME, TEXT, top=4)
    lines = capsys.readouterr().out.splitlines()
    for rank, (line, result) in enumerate(zip(lines, found, strict=True), start=1):
        match = f"{result.match:.4f}" if rank <= 2 else "-"
        assert line.split() == [str(rank), f"{result.score:.4f}", match, str(result.path)]


@pytest.mark.parametrize("top", [5, 50])
def test_without_weight_the_order_is_the_first_stage_s(open_with, first_stage, top):
    found = open_with(rerank_top=top, rerank_weight=0).search(NAME, TEXT, top=100)
    assert [result._replace(match=None) for result in found] == first_stage
    assert [result.match is None for result in found] == [number >= top for number in range(35)]


def test_only_the_first_are_looked_at_and_the_rest_stays_behind_them(open_with, first_stage):
    found = open_with(rerank_top=6).search(NAME, TEXT, top=20)
    assert found[6:] == first_stage[6:20]
    assert sorted(names_of(found[:6])) == sorted(names_of(first_stage[:6]))
    assert names_of(found[:6]) != names_of(first_stage[:6])
    matches = [result.match for result in found[:6]]
    assert matches == sorted(matches, reverse=True)
    # Fewer are the best of as many as are looked at.
    few = open_with(rerank_top=6).ask(NAME, TEXT, top=2)
    assert (few.results, few.again) == (found[:2], 6)


def test_faiss_s_candidates_are_looked_at_like_any_others(open_with):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    exact, few = (open_with(engine=engine, candidates=1000) for engine in ("exact", "faiss"))
    assert few.search(NAME, TEXT, top=8) == exact.search(NAME, TEXT, top=8)


def test_the_re_ranker_reads_the_prompts_of_the_strength_that_was_asked_for(open_with, brute_force):
    scores, _ = brute_force(0.5)
    found = open_with().search(NAME, TEXT, top=100, strength=0.5)
    assert names_of(found) == sorted(scores, key=lambda name: -scores[name][1])
    assert [result.match for result in found] == pytest.approx(
        [scores[result.name][1] for result in found], abs=1e-5
    )
    assert scores != brute_force()[0]


def test_equal_scores_stand_in_the_order_of_the_names(pictures, checkpoint, reranker, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures / "b", folder)
    copied = sorted(path.name for path in folder.iterdir())[::2]
    for name in copied:
        shutil.copy(folder / name, folder / f"a copy of {name}")
        shutil.copy(folder / name, folder / f"z copy of {name}")
    make_index(tmp_path / "index", folder, checkpoint)
    searcher = Searcher.open(tmp_path / "index", device="cpu", rerank=reranker[0])
    found = names_of(searcher.search(pictures / NAME, TEXT, top=100))
    assert len(found) == 24
    for name in copied:
        place = found.index(name)
        assert found[place - 1 : place + 2] == [f"a copy of {name}", name, f"z copy of {name}"]
    # All of them equal.
    torch.nn.init.zeros_(searcher.second.model.itm_head.weight)
    assert names_of(searcher.search(pictures / NAME, TEXT, top=100)) == searcher.index.names


def test_what_was_looked_at_is_not_read_again(open_with, monkeypatch):
    searcher, reads = open_with(rerank_top=10), []
    own = reranking.load_image
    monkeypatch.setattr(reranking, "load_image", lambda path, *rest: reads.append(path) or own(path, *rest))
    first = searcher.search(NAME, TEXT, top=30)
    assert sorted(reads) == sorted(result.path for result in first[:10])
    assert searcher.search(NAME, TEXT, top=30) == first
    assert searcher.with_index(searcher.index).search(NAME, TEXT, top=30) == first
    assert len(reads) == 10


def test_what_was_asked_for_longest_ago_is_dropped():
    kept = KeptTokens(most=3)
    kept.keep({name: torch.ones(1) for name in "abc"})
    assert list(kept.of(["a", "x"])) == ["a"]
    kept.keep({"d": torch.ones(1)})
    assert list(kept.of(list("abcd"))) == ["a", "c", "d"]


def test_a_picture_that_is_gone_or_broken_is_told_with_what_to_do(pictures, checkpoint, reranker, tmp_path):
    folder, index = tmp_path / "pictures", tmp_path / "index"
    shutil.copytree(pictures / "a", folder)
    make_index(index, folder, checkpoint)
    settings = {"device": "cpu", "rerank": reranker[0]}
    expected = Searcher.open(index, **settings).search(pictures / NAME, TEXT, top=20)
    whole = expected[0].path.read_bytes()
    expected[0].path.write_bytes(whole[:200])
    with pytest.raises(
        InputError, match=f"{expected[0].name} cannot be read any more; run `search.py index`"
    ):
        Searcher.open(index, **settings).search(pictures / NAME, TEXT)
    expected[0].path.unlink()
    with pytest.raises(InputError, match=f"{expected[0].name} is gone; run `search.py index` again"):
        query(index, image=str(pictures / NAME), rerank=reranker[0])
    make_index(index, folder, checkpoint)
    again = Searcher.open(index, **settings).search(pictures / NAME, TEXT, top=20)
    assert names_of(again) == names_of(expected[1:])


def test_a_re_ranker_belongs_to_its_first_stage(data, pictures, reranker, tmp_path):
    other, index = save_model(tmp_path / "other.pt", data, 1), tmp_path / "index"
    make_index(index, pictures / "a", other)
    flags = {"image": "dev-0-0-img0.png", "rerank": reranker[0]}
    with pytest.raises(
        InputError, match=r"is of another first stage, .*model\.pt; give .*or add --rerank-any"
    ):
        query(index, **flags)
    query(index, **flags, rerank_any=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rerank_top": 5}, "--rerank-top: nothing re-ranks; give --rerank FILE"),
        ({"rerank_weight": [0.0]}, "--rerank-weight: nothing re-ranks"),
        ({"rerank_any": True}, "--rerank-any: nothing re-ranks"),
        ({"rerank": True, "rerank_top": 0}, "--rerank-top 0 is too small"),
        ({"rerank": True, "rerank_weight": [1.5]}, "--rerank-weight 1.5 must be a number from 0 to 1"),
        ({"rerank": True, "rerank_weight": [0.5, 1]}, "--rerank-weight 0.5 1: a query takes one"),
    ],
)
def test_a_flag_that_cannot_work_is_refused(picture_index, reranker, settings, message):
    settings = {**settings, **({"rerank": reranker[0]} if "rerank" in settings else {})}
    with pytest.raises(InputError) as caught:
        query(picture_index, **settings)
    assert str(caught.value).startswith(message)
    if len(settings.get("rerank_weight", ())) < 2:
        settings = {**settings, "rerank_weight": next(iter(settings.get("rerank_weight", ())), None)}
        with pytest.raises(InputError, match=message):
            Searcher.open(picture_index, **settings)


def test_what_is_no_re_ranker_is_refused(picture_index, checkpoint, reranker, tmp_path):
    with pytest.raises(
        InputError, match=f"--rerank {checkpoint} holds blip2_cir_align_prompt and no re-ranker"
    ):
        query(picture_index, rerank=checkpoint)
    with pytest.raises(InputError, match=r"nothing\.pt does not exist"):
        query(picture_index, rerank=tmp_path / "nothing.pt")
    with pytest.raises(InputError, match="holds a re-ranker"):
        make_index(tmp_path / "index", open_index(picture_index).folder, reranker[0])
