"""Gate maps: the sheets and the page as a user gets them, and the numbers against plain restatements."""

import html
import json
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.runner import assert_one_clear_line, read_csv, run
from helpers.searching import save_model
from helpers.small_models import CAPTIONS, random_images, randomise, small_config
from PIL import Image

import visualize_gates
from sprc.data.captions import process_caption
from sprc.data.cirr import load_cirr, load_cirr_test
from sprc.data.fashioniq import load_fashioniq
from sprc.data.images import load_image
from sprc.data.synthetic.fashioniq import FashionIQConfig, make_fashioniq
from sprc.data.transforms import make_transform
from sprc.errors import run_script
from sprc.gates.localisation import (
    chance,
    edit_weights,
    gradient_attribution,
    other_captions,
    pointing,
    shares,
    summarise,
)
from sprc.gates.probe import changed_edit
from sprc.map_colors import own_scale
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import load_checkpoint, save_checkpoint
from sprc.models.fusion_maps import fusion_maps, word_maps

MARKUP = "<script>alert('1')</script> make the \"circle\" $x^2$ & </q> blue"


def small_model(tokenizer, **changes):
    model = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory):
    """Files of the trained model as it is, without its fusion, and with another strategy at random."""
    folder = tmp_path_factory.mktemp("checkpoints")
    files = {"gated": trained[0] / "saved_models" / "tuned_clip_arithmetic.pt"}
    loaded = load_checkpoint(files["gated"])
    for name, switches in (
        ("off", {"use_gated_fusion": False}),
        ("additive", {"fusion_strategy": "additive"}),
    ):
        model = Blip2QformerCirAlignPrompt(replace(loaded.model.config, **switches), loaded.model.tokenizer)
        state = loaded.model.state_dict()
        model.load_state_dict({k: v for k, v in state.items() if "gated_fusion" not in k}, strict=False)
        files[name] = folder / f"{name}.pt"
        save_checkpoint(files[name], model, 3, loaded.hyperparameters)
    return files


@pytest.fixture(scope="module")
def marked(data, tmp_path_factory):
    """The data with markup in the first caption of val."""
    out = tmp_path_factory.mktemp("marked")
    shutil.copytree(data / "cirr_dataset", out / "cirr_dataset")
    path = out / "cirr_dataset" / "cirr" / "captions" / "cap.rc2.val.json"
    entries = json.loads(path.read_text())
    entries[0]["caption"] = MARKUP
    path.write_text(json.dumps(entries))
    return out


def visualize(monkeypatch, checkpoint, data, *flags, code=0):
    """Run the script in this process: importing torch again would take longer than the script."""
    flags = ("--dataset", "CIRR", "--model-path", checkpoint, "--data-path", data, "--device", "cpu", *flags)
    monkeypatch.setattr(sys, "argv", ["visualize_gates.py", *map(str, flags)])
    if code:
        with pytest.raises(SystemExit) as stop:
            run_script(visualize_gates.main)
        assert stop.value.code == code
    else:
        run_script(visualize_gates.main)


def loop_rank(model, split, triplet, transform, leave_out_reference=True):
    """The target's rank from 1, one candidate at a time, by the model's `inference`."""

    def encode(name):
        return model.extract_target_features(load_image(split.image_paths[name], transform)[None])

    features, embeds = zip(*(encode(name) for name in split.image_paths), strict=True)
    names = list(split.image_paths)
    reference = embeds[names.index(triplet.reference)]
    scores = model.inference(reference, torch.cat(features), [triplet.caption.lower()])[0].tolist()
    own = scores[names.index(triplet.target)]
    better = [n for n, score in zip(names, scores, strict=True) if score > own]
    return 1 + len([n for n in better if not (leave_out_reference and n == triplet.reference)])


@pytest.mark.slow
def test_the_script_writes_sheets_a_page_and_numbers(marked, checkpoints, tmp_path):
    split = load_cirr(marked, "val")
    chosen = [split.triplets[i] for i in (5, 0, 9, 17, 30, 31, 32, 33, 34)]
    stdout, stderr = run(
        "visualize_gates.py",
        *("--dataset", "CIRR", "--model-path", checkpoints["gated"], "--data-path", marked),
        *("--out", tmp_path / "maps", "--pairs", *(triplet.pair_id for triplet in chosen)),
        *("--localisation", "--off-model-path", checkpoints["off"]),
    )
    files = {path.name for path in (tmp_path / "maps").iterdir()}
    assert files == {"sheet_001.png", "sheet_002.png", "gate_maps.html", "localisation.csv"}
    with Image.open(tmp_path / "maps" / "sheet_001.png") as sheet:
        assert sheet.width > sheet.height > 1000  # eight rows
    assert "sheets: 100%" in stderr

    # The page needs nothing but itself, and a caption is text.
    page = (tmp_path / "maps" / "gate_maps.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 9 * (1 + 2 * 4 + 1 + 5)  # a map lies over an image of its own
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in sources)
    assert not re.search(r"https?:|//|@import|url\(|<link", re.sub(r'src="[^"]*"', "", page))
    assert page.count("<script") == 1
    assert html.escape(MARKUP) in page

    model = load_checkpoint(checkpoints["gated"]).model
    transform = make_transform("targetpad", 96, 1.25)
    sections = re.findall(r'<section class="group" data-order="(\d+)" data-rank="(\d+)">', page)
    assert [int(order) for order, _ in sections] == list(range(9))
    for triplet, (_, rank) in zip(chosen[2:4], sections[2:4], strict=True):
        assert int(rank) == loop_rank(model, split, triplet, transform)
    # One right candidate in the page for each target among the first five, and all others wrong.
    hits = sum(int(rank) <= 5 for _, rank in sections)
    assert page.count("✓ right") == page.count('class="right"') == hits
    assert page.count("✗ wrong") == 9 * 5 - hits

    rows = read_csv(tmp_path / "maps" / "localisation.csv")
    found = Counter((row["model"], row["map"], row["caption"]) for row in rows if row["kind"] == "all")
    maps = [("fused", "gate"), ("fused", "change"), ("fused", "attribution"), ("off", "attribution")]
    assert found == {(*names, caption): 1 for names in maps for caption in ("own", "another")}
    edits = json.loads((marked / "cirr_dataset" / "edits.val.json").read_text())
    kinds = Counter(edit["kind"] for edit in edits.values())
    assert {row["kind"]: int(row["queries"]) for row in rows} == {**kinds, "all": 36}
    for row in rows:
        areas = {len(edit["cells"]) for edit in edits.values() if row["kind"] in (edit["kind"], "all")}
        if len(areas) == 1:  # else a mean of ratios is no ratio of means
            assert float(row["share"]) / float(row["ratio"]) == pytest.approx(float(row["chance"]), rel=1e-6)
        assert float(row["share_low"]) <= float(row["share"]) <= float(row["share_high"])
        assert (row["gain"] != "") == (row["caption"] == "own")
    assert stdout.count("\nfused  gate  ") == 2 * (1 + len(kinds))


def test_the_change_s_share_is_that_of_a_plain_loop(data, checkpoints, monkeypatch, tmp_path):
    visualize(monkeypatch, checkpoints["gated"], data, "--localisation", "--queries", 0, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["localisation.csv"]
    rows = {(r["map"], r["caption"], r["kind"]): r for r in read_csv(tmp_path / "localisation.csv")}
    split = load_cirr(data, "val")
    edits = json.loads((data / "cirr_dataset" / "edits.val.json").read_text())
    model = load_checkpoint(checkpoints["gated"]).model
    transform = make_transform("targetpad", 96, 1.25)
    shares_of = {"gate": [], "change": []}
    with torch.no_grad():
        for triplet in split.triplets:
            embeds = model.encode_image(load_image(split.image_paths[triplet.reference], transform)[None])
            fusion = model.fuse(embeds, model.tokenize([triplet.caption]))
            # The tiny model's patch is one cell: token 1 + 3 row + column.
            tokens = [1 + 3 * row + column for row, column in edits[str(triplet.pair_id)]["cells"]]
            for name, values in (("gate", fusion.gate), ("change", (fusion.fused - embeds).abs())):
                patches = values[0].mean(dim=1)
                shares_of[name].append((patches[tokens].sum() / patches[1:].sum()).item())
    for name, values in shares_of.items():
        share = float(rows[name, "own", "all"]["share"])
        assert share == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_the_probe_scores_the_model_with_its_edit_changed(data, checkpoints, monkeypatch, tmp_path):
    loaded = load_checkpoint(checkpoints["gated"])
    randomise(loaded.model.gated_fusion)  # so that its edits are large
    save_checkpoint(tmp_path / "strong.pt", loaded.model, 0, loaded.hyperparameters)
    visualize(
        monkeypatch,
        tmp_path / "strong.pt",
        data,
        "--probe",
        "--queries",
        0,
        "--out",
        tmp_path,
        "--split",
        "test1",
    )
    rows = {row.pop("edit"): row for row in read_csv(tmp_path / "probe.csv")}
    assert list(rows) == ["as trained", "none", "same for all tokens", "another caption's"]
    model = loaded.model.eval()
    fusion, model.gated_fusion = model.gated_fusion, None
    split = load_cirr_test(data)
    images = torch.stack([load_image(p, make_transform("targetpad", 96)) for p in split.image_paths.values()])
    features, embeds = model.extract_target_features(images)
    names = list(split.image_paths)
    least, most = ({edit: Counter() for edit in list(rows)[:3]} for _ in range(2))
    for triplet in split.triplets:
        reference = names.index(triplet.reference)
        text = model.tokenize([process_caption(triplet.caption)])
        image = embeds[reference : reference + 1]
        with torch.no_grad():
            fused = fusion(image, model.Qformer.bert.embeddings(text.words, 0), text.mask).fused
            mean = (fused - image).mean(dim=1, keepdim=True)
            for edit, tokens in zip(least, (fused, image, image + mean), strict=True):
                scores = (model.compose(tokens, text) @ features.transpose(1, 2)).amax(dim=(1, 2))
                scores[reference] = -9
                own = scores[names.index(triplet.target)]
                # Batches of another size round otherwise: what is as near as that may be on either side.
                for counts, slack in ((least, -1e-5), (most, 1e-5)):
                    rank = int((scores > own + slack).sum())
                    counts[edit].update(k for k in (1, 5, 10) if rank < k)
    assert len({tuple(counts.items()) for counts in least.values()}) > 1
    for k in (1, 5, 10):
        for edit in least:
            found = round(float(rows[edit][f"recall_at{k}"]) / 100 * len(split.triplets))
            assert least[edit][k] <= found <= most[edit][k], (edit, k)


@pytest.mark.parametrize("strategy", ["gated", "cross", "select"])
def test_another_caption_s_edit_is_that_of_the_query_before(tokenizer, strategy):
    fusion = small_model(tokenizer, fusion_strategy=strategy).gated_fusion.eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(5, 10, 24, generator=generator)
    # Five texts of three to six words, in batches of three and two.
    texts = [torch.randn(count, 16, generator=generator) for count in (4, 6, 3, 3, 5)]

    def batch(rows):
        words = torch.nn.utils.rnn.pad_sequence([texts[i] for i in rows], batch_first=True)
        mask = torch.tensor([[j < len(texts[i]) for j in range(words.shape[1])] for i in rows])
        return image[rows], words, mask

    with changed_edit(fusion, "another caption's"), torch.no_grad():
        found = torch.cat([fusion(*batch(rows)).fused for rows in ([0, 1, 2], [3, 4])])
    for i, other in enumerate((2, 0, 1, 2, 3)):
        with torch.no_grad():
            expected = fusion(image[i : i + 1], texts[other][None], torch.ones(1, len(texts[other]))).fused
        torch.testing.assert_close(found[i : i + 1], expected)
    with torch.no_grad():
        again = fusion(*batch([1])).fused  # the hook is gone
        torch.testing.assert_close(again, fusion(image[1:2], texts[1][None], torch.ones(1, 6)).fused)


def test_one_image_under_several_captions(data, checkpoints, monkeypatch, tmp_path):
    split = load_cirr(data, "val")
    counts = Counter(triplet.reference for triplet in split.triplets)
    name = next(name for name, count in counts.items() if count > 1)
    visualize(monkeypatch, checkpoints["gated"], data, "--same-image", name, "--out", tmp_path / "own")
    page = (tmp_path / "own" / "same_image.html").read_text()
    (section,) = re.findall(r'<section class="group several".*', page)
    for triplet in split.triplets:  # of two references a caption may be the same
        assert (f">pair {triplet.pair_id} " in section) == (triplet.reference == name)
        assert html.escape(triplet.caption) in section or triplet.reference != name
    assert section.count("<article") == counts[name]
    with Image.open(tmp_path / "own" / "same_image_001.png") as sheet:
        assert sheet.height > sheet.width  # a column a caption

    captions = ("paint it <b>red</b>", "remove the star", "add a circle")
    flags = ("--same-image", name, "--captions", *captions, "--out", tmp_path / "new")
    visualize(monkeypatch, checkpoints["additive"], data, *flags)
    page = (tmp_path / "new" / "same_image.html").read_text()
    assert re.findall(r"<q>(.*?)</q>", page) == [html.escape(caption) for caption in captions]
    assert 'data-rank=""' in page  # no target, so no rank and no marks
    assert "right</figcaption>" not in page
    assert "change, 0 to 1" in page
    assert "gate, 0 to 1" not in page  # `additive` has none


@pytest.fixture(scope="module")
def by_token(data, tmp_path_factory):
    """Files of models at random of the strategies in which tokens have edits of their own."""
    folder = tmp_path_factory.mktemp("by_token")
    return {
        strategy: save_model(
            folder / f"{strategy}.pt", data, 0, fusion_strategy=strategy, fusion_start="random"
        )
        for strategy in ("cross", "select")
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cross", "select"])
def test_each_word_has_its_map_on_a_sheet_and_on_the_page(marked, by_token, tmp_path, strategy):
    first = load_cirr(marked, "val").triplets[0]
    stdout, _ = run(
        "visualize_gates.py",
        *("--dataset", "CIRR", "--model-path", by_token[strategy], "--data-path", marked, "--device", "cpu"),
        *("--out", tmp_path, "--pairs", first.pair_id, "--per-word"),
    )
    assert f"wrote {tmp_path / 'sheet_words_001.png'}" in stdout
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"sheet_001.png", "sheet_words_001.png", "gate_maps.html"}
    page = (tmp_path / "gate_maps.html").read_text()
    assert MARKUP not in page
    model = load_checkpoint(by_token[strategy]).model
    image = load_image(
        load_cirr(marked, "val").image_paths[first.reference], make_transform("targetpad", 96, 1.25)
    )
    with torch.no_grad():
        embeds = model.encode_image(image[None])
    words, left_out, attention = word_maps(model, embeds, first.caption)
    assert {"<", "script"} <= set(words)
    cells = re.findall(r'<div class="bar">([^<]*)<i></i>([^<]*)</div><figcaption>([^<]*)</figcaption>', page)
    lists = [("without: ", left_out, words)]
    if strategy == "cross":
        lists += [("reads: ", attention[:-1], words), ("reads: ", attention[-1:], ["[CLS], [SEP]"])]
    expected = [
        ("0", f"{maps.max().item():.3g}", html.escape(prefix + word))
        for prefix, maps, names in lists
        for word in names
    ]
    found = [cell for cell in cells if cell[2].startswith(("without", "reads"))]
    assert [name for *_, name in found] == [name for *_, name in expected]
    for (low, high, _), (_, most, _) in zip(found, expected, strict=True):
        assert float(low) == 0
        assert float(high) == pytest.approx(float(most), rel=0.01)


def test_words_of_captions_side_by_side(data, by_token, monkeypatch, tmp_path):
    captions = ("remove the star", "add a circle " * 6)  # of which the second takes two rows
    flags = ("--same-image", "dev-0-0-img0", "--captions", *captions, "--per-word", "--out", tmp_path)
    visualize(monkeypatch, by_token["select"], data, *flags)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"same_image_001.png", "same_image_words_001.png", "same_image.html"}
    page = (tmp_path / "same_image.html").read_text()
    assert page.count("without: ") == 3 + 18
    with Image.open(tmp_path / "same_image_words_001.png") as sheet:
        assert sheet.width > 10 * 1.4 * 120
        assert 3 < sheet.height / (1.4 * 120) < 5  # three rows and their gaps


def test_a_hidden_test_split_is_drawn_without_marks_and_measured(data, checkpoints, monkeypatch, tmp_path):
    flags = ("--split", "test1", "--queries", 2, "--localisation", "--out", tmp_path)
    visualize(monkeypatch, checkpoints["additive"], data, *flags)
    page = (tmp_path / "gate_maps.html").read_text()
    assert page.count('data-rank=""') == 2
    assert "right</figcaption>" not in page
    rows = [row for row in read_csv(tmp_path / "localisation.csv") if row["kind"] == "all"]
    assert {row["map"] for row in rows} == {"change", "attribution"}
    # Every token of `additive` moves by the same step: its map is flat, rounding aside.
    for row in rows:
        if row["map"] == "change":
            for name in ("share", "pointing"):
                assert float(row[name]) == pytest.approx(float(row["chance"]), rel=1e-4)


def test_fashioniq_is_drawn_in_its_own_gallery_with_the_reference_in_it(checkpoints, monkeypatch, tmp_path):
    families = {"train_families": 1, "val_families": 1, "test_families": 1}
    make_fashioniq(tmp_path, FashionIQConfig(**families, image_size=48))
    split = load_fashioniq(tmp_path, "val", "shirt")
    model = load_checkpoint(checkpoints["gated"]).model
    transform = make_transform("targetpad", 96, 1.25)
    pairs = (5, 0, 1, 2, 3, 4)
    ranks, without = (
        [str(loop_rank(model, split, split.triplets[pair], transform, leave_out)) for pair in pairs]
        for leave_out in (False, True)
    )
    assert ranks != without  # else this could not tell the two apart
    flags = ("--dataset", "FashionIQ", "--fiq-type", "shirt", "--pairs", *pairs, "--localisation")
    visualize(monkeypatch, checkpoints["gated"], tmp_path, *flags, "--out", tmp_path / "maps")
    page = (tmp_path / "maps" / "gate_maps.html").read_text()
    assert re.findall(r"<h2>pair (\d) ", page) == list(map(str, pairs))
    assert re.findall(r'data-rank="(\d+)"', page) == ranks
    edits = json.loads((tmp_path / "fashionIQ_dataset/edits.shirt.val.json").read_text())
    (row,) = [
        row
        for row in read_csv(tmp_path / "maps" / "localisation.csv")
        if (row["map"], row["caption"], row["kind"]) == ("gate", "own", "all")
    ]
    area = sum(len(edit["cells"]) / 9 for edit in edits) / len(edits)
    assert float(row["chance"]) == pytest.approx(area)


def test_a_probe_needs_targets(data, checkpoints, monkeypatch, tmp_path, capsys):
    shutil.copytree(data / "cirr_dataset", tmp_path / "cirr_dataset", ignore=lambda *_: {"train", "dev"})
    (tmp_path / "cirr_dataset" / "edits.test1.json").unlink()
    flags = ("--probe", "--split", "test1")
    visualize(monkeypatch, checkpoints["gated"], tmp_path, *flags, code=2)
    assert_one_clear_line(capsys.readouterr().err, "only the built-in data have targets for test1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pairs", 10**6), "--pairs 1000000: the split val has no such pair; its ids run from"),
        (("--queries", 0), "--queries 0 draws nothing"),
        (("--queries", -1), "--queries -1: give a whole number"),
        (("--split", "dev"), "CIRR has no split 'dev'"),
        (("--captions", "add a star"), "--captions needs one image"),
        (("--same-image", "nobody"), "--same-image 'nobody': the split val has no such image"),
        (("--same-image", "--pairs", 1), "--pairs and --same-image do not go together"),
        (("--same-image", "dev-0-0-img0", "--captions", " ."), "--captions ' .' holds no word"),
        (("--off-model-path", "gated"), "only --localisation uses it"),
        (
            ("--off-model-path", "gated", "--localisation"),
            "gated.pt holds a fusion; give a",
        ),
        (("--queries", 0, "--probe", "--per-word"), "--queries 0 draws nothing, and --per-word draws"),
        (
            ("--model-path", "additive", "--per-word"),
            "additive.pt: additive moves all tokens by the same step",
        ),
        (("--model-path", "off"), "off.pt holds plain SPRC: without fusion there is no gate"),
        (("--out", "file"), "cannot write there"),
    ],
)
def test_wrong_input_is_one_clear_line(data, checkpoints, monkeypatch, tmp_path, capsys, flags, message):
    shutil.copy(checkpoints["gated"], tmp_path / "gated.pt")
    shutil.copy(checkpoints["off"], tmp_path / "off.pt")
    shutil.copy(checkpoints["additive"], tmp_path / "additive.pt")
    (tmp_path / "file").touch()
    files = {"gated": "gated.pt", "off": "off.pt", "additive": "additive.pt", "file": "file"}
    flags = [tmp_path / files[flag] if flag in files else flag for flag in flags]
    visualize(monkeypatch, checkpoints["gated"], data, *flags, code=2)
    assert_one_clear_line(capsys.readouterr().err, message)


def test_localisation_refuses_data_that_do_not_tell_the_place(
    marked, checkpoints, monkeypatch, tmp_path, capsys
):
    shutil.copytree(marked, tmp_path / "copy")
    root = tmp_path / "copy" / "cirr_dataset"
    edits = json.loads((root / "edits.val.json").read_text())
    first = load_cirr(marked, "val").triplets[0]

    def refused(message):
        flags = ("--localisation", "--out", tmp_path / "maps")
        visualize(monkeypatch, checkpoints["gated"], tmp_path / "copy", *flags, code=2)
        assert_one_clear_line(capsys.readouterr().err, message)
        assert not (tmp_path / "maps").exists()

    own = edits[str(first.pair_id)]
    for change, message in (
        ({"cells": [[0, 3]]}, "'cells' holds [[0, 3]], not [row, column]"),
        ({"kind": "turn"}, "'kind' is 'turn', not one of"),
        ({"target": "nobody"}, "'target' names 'nobody'"),
    ):
        (root / "edits.val.json").write_text(json.dumps({**edits, str(first.pair_id): own | change}))
        refused(f"edits.val.json: entry {first.pair_id}: {message}")
    (root / "edits.val.json").write_text(json.dumps(edits))
    path = load_cirr(tmp_path / "copy", "val").image_paths[first.reference]
    Image.new("RGB", (96, 80)).save(path)
    refused("has 96 x 80 pixels")
    (root / "edits.val.json").unlink()
    refused("edits.val.json is missing: --localisation needs to know")


@pytest.mark.parametrize(("image_size", "patch_size"), [(12, 4), (12, 12), (10, 2), (16, 4)])
@pytest.mark.parametrize("strategy", ["gated", "additive", "cross", "select"])
def test_maps_are_means_over_channels_on_any_grid(tokenizer, image_size, patch_size, strategy):
    changes = {"fusion_strategy": strategy, "fusion_top_k": 2}
    model = small_model(tokenizer, image_size=image_size, patch_size=patch_size, **changes)
    side = image_size // patch_size
    with torch.no_grad():
        embeds = model.encode_image(random_images(3, model.config))
        fusion = model.fuse(embeds, model.tokenize(CAPTIONS))
    gate, change = fusion_maps(model, embeds, CAPTIONS)
    assert (gate is None) == (strategy == "additive")
    for b in range(3):
        for row in range(side):
            for column in range(side):
                token = 1 + row * side + column  # after [CLS]
                moved = (fusion.fused - embeds)[b, token].abs()
                assert change[b, row, column].item() == pytest.approx(moved.mean().item(), rel=1e-5)
                if gate is not None:
                    # `select` has one gate for all tokens, and weighs them.
                    own = fusion.gate[b, 0 if strategy == "select" else token].tolist()
                    weight = 1 if fusion.weights is None else fusion.weights[b, token].item()
                    mean = weight * sum(own) / embeds.shape[2]
                    assert gate[b, row, column].item() == pytest.approx(mean, rel=1e-5)
                    if strategy == "select":
                        assert (gate[b, row, column] > 0) == (moved.sum() > 0) == (weight > 0)
    assert change.shape == (3, side, side)


def test_without_fusion_there_are_no_maps(tokenizer):
    model = small_model(tokenizer, use_gated_fusion=False)
    embeds = model.encode_image(random_images(3, model.config))
    assert fusion_maps(model, embeds, CAPTIONS) == (None, None)


def test_a_flat_map_has_a_scale():
    low, high = own_scale(torch.full((3, 3), 0.5) + 1e-7 * torch.rand(3, 3))
    assert low < 0.5 < high
    assert own_scale(torch.zeros(3, 3)) == (0.0, 1.0)
    assert own_scale(torch.tensor([[0.25, 0.5]])) == (0.25, 0.5)


@pytest.mark.parametrize("patches", [1, 2, 3, 4, 5, 16])
def test_edit_weights_are_the_share_of_pixels(patches):
    """Painted pixel by pixel, on an image that both grids divide."""
    for cells in ([(0, 1)], [(2, 2), (1, 0)], [(0, 0)]):
        side, patch = 3 * patches, 3
        expected = torch.zeros(patches, patches, dtype=torch.float64)
        for y in range(side):
            for x in range(side):
                if (y * 3 // side, x * 3 // side) in cells:
                    expected[y // patch, x // patch] += 1 / patch**2
        assert torch.allclose(edit_weights(cells, patches), expected)


def test_a_map_of_the_edit_scores_one_and_a_flat_map_scores_chance():
    weights = torch.stack([edit_weights(cells, 6) for cells in ([(1, 2)], [(0, 0), (2, 1)])])
    assert chance(weights).tolist() == pytest.approx([1 / 9, 2 / 9])
    for score in (shares, pointing):
        assert score(weights, weights).tolist() == pytest.approx([1, 1])
        assert score(1 - weights, weights).tolist() == pytest.approx([0, 0])
        for flat in (torch.full_like(weights, 0.4), torch.zeros_like(weights)):
            assert score(flat, weights).tolist() == pytest.approx([1 / 9, 2 / 9])


def test_shares_and_pointing_are_those_of_a_plain_loop():
    draw = random.Random(0)
    cells = [[(draw.randrange(3), draw.randrange(3))] for _ in range(40)]
    weights = torch.stack([edit_weights(own, 5) for own in cells])  # patches that lie across cells
    maps = torch.rand(40, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for values, weight, share, point in zip(
        maps, weights, shares(maps, weights), pointing(maps, weights), strict=True
    ):
        total = on_edit = 0.0
        best, best_weight = -1.0, None
        for row in range(5):
            for column in range(5):
                value, part = values[row, column].item(), weight[row, column].item()
                total, on_edit = total + value, on_edit + part * value
                if value > best:
                    best, best_weight = value, part
        assert share.item() == pytest.approx(on_edit / total)
        assert point.item() == pytest.approx(best_weight)


def test_the_summary_groups_by_kind_and_its_interval_is_that_of_a_mean():
    generator = torch.Generator().manual_seed(1)
    weights = torch.stack([edit_weights([(i % 3, 1)], 3) for i in range(200)])
    maps = torch.rand(200, 3, 3, generator=generator, dtype=torch.float64)
    others = torch.rand(200, 3, 3, generator=generator, dtype=torch.float64)
    kinds = ["color" if i < 150 else "move" for i in range(200)]
    rows = {row["kind"]: row for row in summarise(maps, weights, kinds, others)}
    assert list(rows) == ["all", "color", "move"]
    assert [row["queries"] for row in rows.values()] == [200, 150, 50]
    for kind, chosen in (("all", slice(0, 200)), ("color", slice(0, 150)), ("move", slice(150, 200))):
        own = shares(maps, weights)[chosen]
        gains = own - shares(others, weights)[chosen]
        for name, values in (("share", own), ("gain", gains), ("ratio", 9 * own)):
            row = rows[kind]
            assert row[name] == pytest.approx(values.mean().item())
            # A mean's interval is close to 1.96 standard errors on both sides.
            error = (values.std() / len(values) ** 0.5).item()
            assert row[f"{name}_low"] == pytest.approx(row[name] - 1.96 * error, abs=0.3 * error)
            assert row[f"{name}_high"] == pytest.approx(row[name] + 1.96 * error, abs=0.3 * error)


def test_another_caption_is_never_a_query_s_own(data):
    triplets = [replace(t, caption=str(i)) for i, t in enumerate(load_cirr(data, "val").triplets)]
    for seed in range(5):
        others = other_captions(triplets, seed)
        assert sorted(others, key=int) == [str(i) for i in range(len(triplets))]
        assert all(other != triplet.caption for other, triplet in zip(others, triplets, strict=True))


@pytest.mark.parametrize("fusion", [True, False])
def test_gradient_attribution_is_that_of_finite_differences(tokenizer, fusion):
    model = small_model(tokenizer, use_gated_fusion=fusion).double()
    with torch.no_grad():
        images = torch.randn(
            5, 10, model.config.vit_width, generator=torch.Generator().manual_seed(0)
        ).double()
        references, targets = images[:2], model.target_features(images[3:])
    captions = CAPTIONS[:2]
    found = gradient_attribution(model, references, captions, targets)
    assert found.shape == (2, 3, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    step = 1e-5
    for b in range(2):
        text = model.tokenize([captions[b]])
        for token in (1, 4, 9):
            expected = 0.0
            for channel in range(model.config.vit_width):
                scores = []
                for sign in (1, -1):
                    moved = references[b : b + 1].clone()
                    moved[0, token, channel] += sign * step
                    with torch.no_grad():
                        query = model.compose(moved, text)[0]
                    scores.append(max((query @ target).item() for target in targets[b]))
                slope = (scores[0] - scores[1]) / (2 * step)
                expected += abs(slope * references[b, token, channel].item())
            assert found[b].flatten()[token - 1].item() == pytest.approx(expected, rel=1e-4)
