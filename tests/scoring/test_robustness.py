"""The robustness report: its queries against `inference`, its clean row against validation, its files."""

import random
from pathlib import Path

import pytest
import torch
from helpers.runner import read_csv, run
from helpers.searching import save_model
from helpers.small_models import random_images, randomise, small_config
from helpers.small_split import NAMES, REFERENCES, TRIPLETS
from PIL import Image, ImageFilter

from sprc.data.captions import process_caption
from sprc.data.perturbations import OF_TEXT
from sprc.data.split import Split
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.scoring import robustness
from sprc.scoring.benchmarks import CIRR, FashionIQ, benchmark_class
from sprc.scoring.ranking import Ranking
from sprc.scoring.robustness import (
    CLEAN,
    EITHER,
    ChangedReferences,
    better_half,
    changed_captions,
    compose_pictures,
    compose_texts,
    measure,
    run_robustness,
)
from sprc.scoring.scorer import Scorer
from sprc.scoring.settings import RobustnessSettings, ValidationSettings
from sprc.scoring.validation import run_validation

UNREAD = ("lower-case", "upper-case", "no-punctuation", "stops")  # of the built-in data's captions
SPLIT = Split("val", TRIPLETS, {name: Path("folder") / name for name in NAMES})


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "off"])
def small(request, tokenizer):
    """A small model, and its images' pixels by name."""
    model = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=request.param), tokenizer)
    randomise(model)
    return model, dict(zip(NAMES, random_images(len(NAMES), model.config), strict=True))


def by_inference(model, pixels, captions):
    """Each query by itself: against unit axes, similarities are the entries of the query."""
    axes = torch.eye(model.config.embed_dim)[:, None, :]
    model.eval()
    _, tokens = model.extract_target_features(torch.stack(pixels))
    queries = zip(tokens, captions, strict=True)
    return torch.stack([model.inference(one[None], axes, [caption])[0] for one, caption in queries])


def test_other_captions_are_composed_as_inference_does(small):
    model, pixels = small
    captions = [[t.caption for t in TRIPLETS], [t.caption.split()[-1] for t in TRIPLETS[::-1]]]
    found = compose_texts(model, SPLIT, lambda path: pixels[path.name], captions, batch_size=3, num_workers=0)
    for own, texts in zip(found, captions, strict=True):
        expected = by_inference(model, [pixels[NAMES[i]] for i in REFERENCES], texts)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0], found[1])


def test_other_pictures_are_composed_as_inference_does_one_for_each_query(small):
    model, _ = small
    pictures = list(enumerate(random_images(len(TRIPLETS), model.config, seed=9)))
    found = compose_pictures(model, SPLIT, pictures, batch_size=4, num_workers=0)
    expected = by_inference(model, [image for _, image in pictures], [t.caption for t in TRIPLETS])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_query_s_caption_is_changed_by_its_own_id(small):
    (one,) = changed_captions(SPLIT, [("swapped-words", 1.0)], 5)
    for triplet, caption in zip(TRIPLETS, one, strict=True):
        generator = random.Random(f"5 swapped-words 1 {triplet.pair_id}")
        assert caption == OF_TEXT["swapped-words"].change(triplet.caption, generator, 1)
    less = Split("val", TRIPLETS[4:], SPLIT.image_paths)
    assert changed_captions(less, [("swapped-words", 1.0)], 5) == [one[4:]]
    assert changed_captions(SPLIT, [("swapped-words", 1.0)], 6) != [one]


def test_either_half_has_the_better_rank_of_each_query():
    text = Ranking(ranks=torch.tensor([0, 7, 3]), set_ranks=torch.tensor([2, 0, 1]))
    image = Ranking(ranks=torch.tensor([4, 5, 3]), set_ranks=torch.tensor([1, 3, 0]))
    found = better_half(text, image)
    assert (found.ranks.tolist(), found.set_ranks.tolist()) == ([0, 5, 3], [1, 0, 0])
    assert better_half(text._replace(set_ranks=None), image._replace(set_ranks=None)).set_ranks is None


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A checkpoint of plain SPRC, not trained."""
    return save_model(tmp_path_factory.mktemp("plain") / "model.pt", data, 1, use_gated_fusion=False)


def rows_of(data, checkpoint, names, dataset="cirr", **flags):
    benchmark = benchmark_class(dataset).load(data, None if dataset == "cirr" else "original", **flags)
    scorer = Scorer.load(checkpoint, device=torch.device("cpu"))
    return benchmark, measure(scorer, benchmark, names, 0)


def test_what_the_cleaning_takes_away_leaves_exactly_the_clean_figures(data, plain):
    benchmark, (clean, *rows) = rows_of(data, plain, (*UNREAD, "dropped-words"))
    assert {process_caption(t.caption) for t in benchmark.splits[0].triplets} == {
        t.caption for t in benchmark.splits[0].triplets
    }
    found = {row.change: row for row in rows}
    for name in UNREAD:
        assert found[name].metrics == clean.metrics
        assert found[name].difference == (0.0, 0.0, 0.0)
    assert found["dropped-words"].metrics != clean.metrics  # of two words, which comes last
    for row in rows:
        value, low, high = row.difference
        expected = row.metrics[CIRR.headline] - clean.metrics[CIRR.headline]
        assert value == pytest.approx(expected, abs=1e-9)
        assert low <= value <= high


def test_a_changed_reference_is_the_file_s_picture_changed_and_prepared(data, checkpoint):
    split = CIRR.load(data, None).splits[0]
    scorer = Scorer.load(checkpoint, device=torch.device("cpu"))
    pictures = ChangedReferences(split, scorer, "blur", robustness.OF_PICTURES["blur"], 4.0, 0)
    number, found = pictures[5]
    with Image.open(split.image_paths[split.triplets[5].reference]) as image:
        radius = 0.04 * min(image.size)
        expected = scorer.transform(image.convert("RGB").filter(ImageFilter.GaussianBlur(radius)))
    assert number == 5
    assert torch.equal(found, expected)
    assert len(pictures) == len(split.triplets)


def test_the_script_s_table_has_validation_s_figures_and_a_row_a_level(data, checkpoint, tmp_path):
    flags = ("--dataset", "CIRR", "--data-path", data, "--model-path", checkpoint, "--split", "test1")
    names = ("typos", "upper-case", "rotated")
    out = tmp_path / "new" / "report"
    stdout, _ = run("check_robustness.py", *flags, "--perturbations", *names, "--out", out)
    rows = read_csv(out / "robustness.csv")
    assert [(row["group"], row["change"], row["level"]) for row in rows] == [
        *(("query", name, "") for name in (CLEAN, "text only", "image only", EITHER)),
        *(("text", "typos", f"wrong letters: {count}") for count in (1, 2, 4)),
        ("text", "upper-case", ""),
        *(("picture", "rotated", f"{degrees} degrees") for degrees in (5, 20, 90)),
    ]
    settings = {"dataset": "cirr", "data_path": data, "model_path": checkpoint, "split": "test1"}
    for name, value in run_validation(ValidationSettings(**settings, device="cpu")).items():
        assert float(rows[0][name]) == value, name
    assert (out / "robustness.md").read_text() in stdout
    table = [line.split(" | ") for line in stdout.splitlines() if line.startswith("| ")]
    assert table[0] == ["| change", "level", "R@1", "R@5", "R_s@1", CIRR.headline, "difference (95 %) |"]
    assert [row[2] for row in table[1:]] == [f"{float(row['recall_at1']):.1f}" for row in rows]
    assert f"split test1, {len(CIRR.load(data, None, 'test1').splits[0].triplets)} queries: gated" in stdout
    with Image.open(out / "robustness.png") as image:
        assert min(image.size) > 200
    assert (rows[0]["difference"], float(rows[7]["difference"])) == ("", 0.0)  # clean, upper case


def test_fashioniq_is_scored_by_type_with_what_is_missing_left_out(checkpoint, tmp_path, capsys):
    sizes = ("--train-families", 1, "--val-families", 1, "--test-families", 1)
    run("make_demo_data.py", "--dataset", "FashionIQ", "--out", tmp_path, *sizes)
    whole = FashionIQ.load(tmp_path, "original")
    whole.splits[1].image_paths[whole.splits[1].triplets[0].reference].unlink()
    benchmark, rows = rows_of(
        tmp_path, checkpoint, ("commas", "jpeg"), dataset="fashioniq", missing_images="skip"
    )
    assert [row.change for row in rows[4:]] == ["commas", "jpeg", "jpeg", "jpeg"]
    counts = [len(split.triplets) for split in benchmark.splits]
    assert counts[1] < len(whole.splits[1].triplets)
    for row in rows:
        assert row.metrics["protocol"] == "original"
        assert row.metrics["missing_images"] == 1
        if row.difference is not None:
            expected = row.metrics[FashionIQ.headline] - rows[0].metrics[FashionIQ.headline]
            assert row.difference[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": __file__}, r"--out .* is a file; give a folder"),
        ({"out": f"{__file__}/report"}, r"--out .*: cannot write there .*; choose another folder"),
        ({"perturbations": ["fog"]}, "--perturbations 'fog' is unknown; choose from typos, "),
        ({"split": "train"}, "--split train: CIRR's runs are scored on its validation split"),
        ({"model_path": Path("none.pt")}, "none.pt"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(data, checkpoint, changes, message):
    flags = {"dataset": "cirr", "data_path": data, "model_path": checkpoint, "device": "cpu"} | changes
    flags |= {name: Path(flags[name]) for name in ("out",) if name in flags}
    with pytest.raises(InputError, match=message):
        run_robustness(RobustnessSettings(**flags))
