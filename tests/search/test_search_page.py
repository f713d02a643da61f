"""What the page does, without a browser; test_browser.py clicks on it in one."""

import gc
import io
import json
import os
import re
import shutil
import socket
import sys
import weakref

import pytest
import torch
from helpers.searching import TEXT, make_index, png_header, save_model, save_reranker
from PIL import Image

import app
from sprc.data.cirr import load_cirr
from sprc.errors import InputError, Interrupted
from sprc.models.fusion_maps import word_maps
from sprc.search import app as search_app
from sprc.search import searcher as searcher_module
from sprc.search.index import open_index
from sprc.search.searcher import Searcher

st_testing = pytest.importorskip("streamlit.testing.v1", reason="Streamlit is not installed")
from sprc.search import page as page_module  # noqa: E402
from sprc.search import shown as shown_module  # noqa: E402

MARKUP = "<img src=x onerror=alert(1)> **bold** [link](https://example.org) :red[make] $x^2$ it blue"
NAME = "a/dev-0-0-img0.png"


@pytest.fixture(autouse=True)
def own_main(monkeypatch):
    """Streamlit puts its script in the place of `__main__`, which new processes of other tests look at."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    """The audit hooks that a start would add; none can be taken off again."""
    added = []
    monkeypatch.setattr("sys.addaudithook", added.append)
    return added


def script(index, samples=None, more=None):
    from sprc.search.page import show

    settings = {"model_path": None, "engine": "exact", "candidates": 1000, "device": "cpu"}
    show(samples, index=index, **settings, **(more or {}))


def open_page(index, samples=None, more=None, **params):
    page = st_testing.AppTest.from_function(script, args=(str(index), samples and str(samples), more))
    page.query_params.update(params)
    return run(page)


def run(page):
    page.run(timeout=60)
    assert not page.exception
    return page


def texts(page):
    return [element.value for element in page.text]


def results(page, kind="on"):
    """(text under it, name of the button) of each result."""
    scores = [value for value in texts(page) if value[:1].isdigit() and ": " in value]
    keys = [button.key for button in page.button if button.key.startswith(f"result-{kind}-")]
    return [(score, key) for score, key in zip(scores, keys, strict=False)]


def press(page, key):
    page.button(key=key).click()
    return run(page)


def ask(page, text):
    page.text_input(key="text").input(text)
    return run(page)


def names_found(searcher, name, text, strength=1.0, top=8):
    image = Image.open(searcher.index.folder / name)
    vector = searcher.compose(searcher.encode(searcher.pixels(image)), text, strength)
    return searcher.best(vector, top, searcher.copies(name=name))


def test_a_chain_of_edits_and_the_way_back(picture_index):
    searcher = Searcher.open(picture_index)
    page = open_page(picture_index)
    assert "text" not in [field.key for field in page.text_input]
    press(page, "pick-0-go")
    assert NAME in texts(page)
    assert results(page) == []
    ask(page, TEXT)
    first = names_found(searcher, NAME, TEXT)
    assert [score for score, _ in results(page)] == [
        f"{rank}: {result.score:.4f}" for rank, result in enumerate(first, start=1)
    ]
    press(page, "result-on-2-go")
    assert first[2].name in texts(page)
    assert page.text_input(key="text").value == ""
    ask(page, "add a green star")
    second = names_found(searcher, first[2].name, "add a green star")
    assert results(page)[0][0] == f"1: {second[0].score:.4f}"
    press(page, "result-on-0-go")
    assert [button.key for button in page.button if button.key.startswith("step-")] == [
        "step-0-go",
        "step-1-go",
    ]
    press(page, "back")
    assert first[2].name in texts(page)
    assert page.text_input(key="text").value == "add a green star"
    assert results(page)[0][0] == f"1: {second[0].score:.4f}"
    press(page, "step-0-go")
    assert NAME in texts(page)
    assert page.text_input(key="text").value == TEXT
    assert results(page)[0][0] == f"1: {first[0].score:.4f}"
    assert "back" not in [button.key for button in page.button]


def test_a_switch_averages_with_the_chain(picture_index):
    searcher = Searcher.open(picture_index)
    page = open_page(picture_index)
    press(page, "pick-0-go")
    ask(page, TEXT)
    assert "average" not in [toggle.key for toggle in page.toggle]  # there is nothing to average with
    press(page, "result-on-2-go")
    ask(page, "add a green star")
    middle = names_found(searcher, NAME, TEXT)[2].name
    alone = names_found(searcher, middle, "add a green star")
    assert [score for score, _ in results(page)] == [f"{n}: {r.score:.4f}" for n, r in enumerate(alone, 1)]
    page.toggle(key="average").set_value(True)
    run(page)
    both = searcher.search(middle, "add a green star", history=[(NAME, TEXT)], top=8)
    assert [score for score, _ in results(page)] == [f"{n}: {r.score:.4f}" for n, r in enumerate(both, 1)]
    assert [result.name for result in both] != [result.name for result in alone]
    page.slider(key="strength").set_value(0.5)  # of all rounds
    run(page)
    both = searcher.search(middle, "add a green star", history=[(NAME, TEXT)], top=8, strength=0.5)
    assert [score for score, _ in results(page)] == [f"{n}: {r.score:.4f}" for n, r in enumerate(both, 1)]


def test_on_and_off_stand_side_by_side_and_strength_scales_the_edit(picture_index):
    searcher = Searcher.open(picture_index)
    page = open_page(picture_index, reference=NAME, text=TEXT)
    page.toggle(key="compare").set_value(True)
    run(page)
    on, off = (names_found(searcher, NAME, TEXT, strength) for strength in (1.0, 0.0))
    assert [r.name for r in on] != [r.name for r in off]
    lines = [score for score, _ in results(page)]
    expected = [f"{rank}: {r.score:.4f}" for found in (on, off) for rank, r in enumerate(found, start=1)]
    assert [value for value in texts(page) if value in expected] == expected
    assert lines[0] == expected[0]
    page.slider(key="strength").set_value(0.0)
    run(page)
    half = [f"{rank}: {r.score:.4f}" for rank, r in enumerate(off, start=1)]
    assert [value for value in texts(page) if value in half] == half + half
    page.slider(key="opacity").set_value(0.2)
    page.selectbox(key="map").set_value("change, own scale")
    run(page)
    assert any("map, dark to bright: " in caption.value for caption in page.caption)


def test_a_re_ranker_is_turned_off_and_on(checkpoint, pictures, tmp_path, capsys):
    folder, file = tmp_path / "pictures", tmp_path / "reranker.pt"
    shutil.copytree(pictures, folder)
    make_index(tmp_path / "index", folder, checkpoint)
    save_reranker(file, checkpoint)
    more = {"rerank": str(file), "rerank_top": 6, "rerank_weight": 0.7, "rerank_any": False}
    expected = Searcher.open(tmp_path / "index", device="cpu", **more).search(NAME, TEXT, top=8)
    page = open_page(tmp_path / "index", more=more, reference=NAME, text=TEXT)
    lines = [
        f"{rank}: {result.score:.4f}, {result.match:+.2f}" for rank, result in enumerate(expected[:6], 1)
    ]
    lines += [f"{rank}: {result.score:.4f}" for rank, result in enumerate(expected[6:], 7)]
    assert [score for score, _ in results(page)] == lines
    captions = [caption.value for caption in page.caption]
    assert any(re.fullmatch(r"8 best of 36 in \d+ ms; re-ranked 6 in \d+ ms", value) for value in captions)
    assert captions[-1].endswith("Engine: exact. Re-ranker: of the first 6, weight 0.7.")
    page.toggle(key="again").set_value(False)
    run(page)
    plain = names_found(Searcher.open(tmp_path / "index"), NAME, TEXT)
    assert [score for score, _ in results(page)] == [f"{i}: {r.score:.4f}" for i, r in enumerate(plain, 1)]
    assert not any("re-ranked" in caption.value for caption in page.caption)
    # What the re-ranker cannot read is said, without a path; the first stage still answers.
    shutil.rmtree(folder)
    ask(page, "add a green star")
    assert len(results(page)) == 8
    page.toggle(key="again").set_value(True)
    run(page)
    assert results(page) == []
    assert any("The re-ranker cannot read one of the first pictures" in info.value for info in page.info)
    assert str(folder) not in " ".join(info.value for info in page.info)
    assert f"{folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("switches", "maps"),
    [({"use_gated_fusion": False}, []), ({"fusion_strategy": "additive"}, ["change, own scale"])],
)
def test_a_model_without_fusion_or_gate_has_no_such_controls(data, pictures, tmp_path, switches, maps):
    model = save_model(tmp_path / "model.pt", data, 0, **switches)
    make_index(tmp_path / "index", pictures / "a", model)
    page = open_page(tmp_path / "index", reference="dev-0-0-img0.png", text=TEXT)
    assert len(results(page)) == 8
    assert [box.options for box in page.selectbox] == ([maps] if maps else [])
    controls = {element.key for element in (*page.toggle, *page.slider)}
    assert controls == ({"top", "compare", "strength", "opacity"} if maps else {"top"})
    said = [caption.value for caption in page.caption if "no map for each word" in caption.value]
    assert len(said) == len(maps)
    assert all("additive moves all tokens by the same step" in line for line in said)


def test_each_word_has_its_map(data, pictures, tmp_path, monkeypatch):
    drawn, draw_map = [], shown_module.draw_map

    def draw(pixels, shown, opacity):
        drawn.append((shown, opacity))
        return draw_map(pixels, shown, opacity)

    monkeypatch.setattr(shown_module, "draw_map", draw)
    model = save_model(tmp_path / "model.pt", data, 0, fusion_strategy="cross", fusion_start="random")
    make_index(tmp_path / "index", pictures / "a", model)
    searcher = Searcher.open(tmp_path / "index")
    name, text = "dev-0-0-img0.png", "make **it** xylophoneless, \N{CJK UNIFIED IDEOGRAPH-6F22} red"
    page = open_page(tmp_path / "index", reference=name, text=text)
    assert page.selectbox(key="words").options == ["none", "change if it is left out", "attention to it"]
    tokens = searcher.encode(searcher.pixels(Image.open(searcher.index.folder / name)))
    expected = word_maps(searcher.retriever.model, tokens, text)
    assert expected.words == ["make", "it", "xylophoneless", ",", "[UNK]", "red"]
    page.slider(key="strength").set_value(0.5)
    page.slider(key="opacity").set_value(0.4)
    for kind, maps in (
        ("change if it is left out", expected.left_out),
        ("attention to it", expected.attention[:-1]),
    ):
        drawn.clear()
        page.selectbox(key="words").set_value(kind)
        run(page)
        assert [value for value in texts(page) if value in expected.words] == expected.words
        for (shown, opacity), values in zip(drawn, maps, strict=True):
            torch.testing.assert_close(shown.values, values / 2, rtol=1e-4, atol=1e-6)
            assert shown.scale == pytest.approx((0, maps.max().item() / 2), rel=1e-4)
            assert opacity == 0.4
        assert sum("maps, dark to bright: 0 to" in caption.value for caption in page.caption) == 1
    rest = (expected.attention[-1].sum() / expected.attention.sum()).item()
    assert any(f"end have {100 * rest:.0f} % of it" in caption.value for caption in page.caption)
    ask(page, "\u200b")  # a text without a word for the model
    ask(page, "")
    assert [box.key for box in page.selectbox] == []


def test_ready_queries_are_those_of_the_data(data, checkpoint, tmp_path):
    make_index(tmp_path / "index", data / "cirr_dataset/dev", checkpoint)
    page = open_page(tmp_path / "index", data)
    captions = {triplet.caption: triplet.reference for triplet in load_cirr(data, "val").triplets}
    shown = [value for value in texts(page) if value in captions]
    assert len(shown) == 6
    press(page, "sample-3-go")
    assert page.text_input(key="text").value == shown[3]
    assert f"{captions[shown[3]]}.png" in texts(page)
    assert len(results(page)) == 8
    # Another sample starts a new chain.
    press(page, "sample-1-go")
    assert "back" not in [button.key for button in page.button]


def test_words_and_names_are_never_markup(checkpoint, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures / "a", folder)
    name = "_*[a](b)<b>$x$:red[z].png"
    (folder / "dev-0-0-img0.png").rename(folder / name)
    make_index(tmp_path / "index", folder, checkpoint)
    page = open_page(tmp_path / "index", reference=name, text=MARKUP)
    press(page, "result-on-0-go")
    assert MARKUP[:57] + "..." in texts(page)
    page.query_params["reference"] = name
    marked = ["markdown", "caption", "info", "error", "warning", "header", "subheader", "button"]
    for kind in marked:
        for element in page.get(kind):
            for words in (getattr(element, "value", ""), getattr(element, "label", "")):
                assert "onerror" not in str(words)
                assert "z].png" not in str(words)


@pytest.mark.parametrize(
    "name", ["../index/index.json", "/etc/passwd", "a/../a/dev-0-0-img0.png", "\x1b[31m\n"]
)
def test_a_name_from_the_address_never_becomes_a_path(picture_index, name):
    page = open_page(picture_index, reference=name, text=TEXT)
    assert results(page) == []
    (problem,) = [value for value in texts(page) if "is not in the index" in value]
    assert "\x1b" not in problem
    assert "not in the index" not in " ".join(texts(run(page)))  # said once


def upload(page, content, name="picture.png"):
    page.file_uploader[0].upload(name, content, "image/png")
    return run(page)


def test_an_upload_is_searched_with_and_a_bad_one_refused(picture_index, pictures):
    page = open_page(picture_index)
    good = (pictures / NAME).read_bytes()
    upload(page, good)
    assert "your picture" in texts(page)
    ask(page, TEXT)
    before = results(page)
    # It is a copy of one in the index, which is left out.
    expected = names_found(Searcher.open(picture_index), NAME, TEXT)
    assert [score for score, _ in before] == [f"{i}: {r.score:.4f}" for i, r in enumerate(expected, start=1)]
    for content, reason in (
        (good[:500], "no picture that can be read"),
        (b"<svg onload=alert(1)>", "no picture that can be read"),
        (png_header(9000, 9000), "9000 x 9000 pixels; the most is 40 million"),
        (png_header(60_000, 60_000), "too large"),
        (bytes(10 * 2**20 + 1), "the file has 10 MB; the most is 10 MB"),
    ):
        upload(page, content)
        assert any("This picture was refused" in value and reason in value for value in texts(page))
        assert results(page) == before
    # One of a mode and shape of its own.
    file = io.BytesIO()
    Image.new("RGBA", (1, 40)).save(file, "PNG")
    upload(page, file.getvalue())
    assert "your picture" in texts(page)
    assert len([button for button in page.button if button.key.startswith("step-")]) == 1


def test_a_picture_that_is_gone_is_said_and_a_new_index_is_seen(checkpoint, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures / "a", folder)
    make_index(tmp_path / "index", folder, checkpoint)
    page = open_page(tmp_path / "index")
    (folder / "dev-0-0-img0.png").unlink()
    press(page, "pick-0-go")
    assert any("dev-0-0-img0.png is not in the index, or is gone" in value for value in texts(page))
    make_index(tmp_path / "index", folder, checkpoint)
    run(page)
    assert any("11 pictures." in caption.value for caption in page.caption)
    shutil.rmtree(tmp_path / "index")
    page = open_page(tmp_path / "index")
    assert [error.value for error in page.error] == [
        "The index cannot be used. The terminal that started this page says why."
    ]


def test_a_new_index_keeps_the_model_and_a_new_model_lets_the_old_one_go(
    checkpoint, data, pictures, tmp_path, monkeypatch
):
    folder, index = tmp_path / "pictures", tmp_path / "index"
    shutil.copytree(pictures / "a", folder)
    make_index(index, folder, checkpoint)
    loads = []
    own = searcher_module.load_model
    monkeypatch.setattr(searcher_module, "load_model", lambda *a, **b: loads.append(a) or own(*a, **b))
    page = open_page(index, reference="dev-0-0-img0.png", text=TEXT)
    settings = {"model_path": None, "engine": "exact", "candidates": 1000, "device": "cpu"}
    old = weakref.ref(page_module.current_searcher(index=str(index), **settings).retriever.model)
    assert len(loads) == 1
    # A picture more, before the others: the reference is left out by its bytes, not by its old number.
    shutil.copy(folder / "dev-0-0-img0.png", folder / "aaa.png")
    make_index(index, folder, checkpoint)
    run(page)
    assert any("13 pictures." in caption.value for caption in page.caption)
    assert results(page)[0][0].startswith("1: ")
    shown = Searcher.open(index).search("dev-0-0-img0.png", TEXT, top=8)
    assert [score for score, _ in results(page)] == [f"{i}: {r.score:.4f}" for i, r in enumerate(shown, 1)]
    assert len(loads) == 2  # the page's own, and the one of the line before
    other = save_model(tmp_path / "other.pt", data, 1)
    make_index(index, folder, other, rebuild=True)
    run(page)
    assert len(loads) == 3
    gc.collect()
    assert old() is None
    # The reference was the old model's; a new chain begins.
    assert "text" in [field.key for field in page.text_input]
    assert len(results(page)) == 8


# --- how it starts


def start(monkeypatch, tmp_path, *flags):
    """Run `app.py` up to its server; return what that is told: options, and settings of the page."""
    told = []
    monkeypatch.setattr("streamlit.web.cli.main", told.append)
    monkeypatch.setattr("sprc.search.app.INDEX", tmp_path / "no index")
    monkeypatch.setattr("sys.argv", ["app.py", *map(str, flags)])
    app.main()
    ((_, file, *options, dashes, settings),) = told
    assert (file, dashes) == (search_app.__file__, "--")
    return dict(option.removeprefix("--").split("=", 1) for option in options), json.loads(settings)


def test_it_starts_after_the_demo_on_loopback_alone(data, checkpoint, tmp_path, monkeypatch, capsys):
    demo, models = tmp_path / "demo", tmp_path / "models"
    shutil.copytree(data / "cirr_dataset", demo / "cirr_dataset")
    flags = ("--data-path", demo, "--models-path", models, "--device", "cpu")
    with pytest.raises(InputError, match=f"a checkpoint in {models} is missing.*run `make demo`"):
        start(monkeypatch, tmp_path, *flags)
    saved = models / "clip_finetuned_on_cirr_tiny_1/saved_models"
    saved.mkdir(parents=True)
    shutil.copy(checkpoint, saved / "tuned_clip_arithmetic.pt")
    options, settings = start(monkeypatch, tmp_path, *flags)
    assert options["server.address"] == "127.0.0.1"
    assert options["server.maxUploadSize"] == "10"
    assert options["browser.gatherUsageStats"] == "false"
    assert options["client.showErrorDetails"] == "none"
    assert settings["index"] == str(demo / "picture_index")
    assert settings["samples"] == str(demo)
    printed = capsys.readouterr().out
    assert "36 pictures (36 new" in printed
    assert printed.count("device: cpu") == 2  # a line a start
    # A newer run's model takes the place of the old one, and its pictures are indexed again.
    newer = models / "clip_finetuned_on_cirr_tiny_0/saved_models"
    newer.mkdir(parents=True)
    save_model(newer / "tuned_clip_best.pt", data, 1)
    os.utime(saved / "tuned_clip_arithmetic.pt", (1, 1))
    start(monkeypatch, tmp_path, *flags)
    assert "36 pictures (36 new" in capsys.readouterr().out
    assert open_index(demo / "picture_index").scored_as["model_path"] == str(newer / "tuned_clip_best.pt")


def test_it_takes_the_demo_s_own_model_alone(data, checkpoint, tmp_path, monkeypatch, capsys):
    """Not a newer one of another backbone, of other data, or one that is broken."""
    demo, models = tmp_path / "demo", tmp_path / "models"
    shutil.copytree(data / "cirr_dataset", demo / "cirr_dataset")
    flags = ("--data-path", demo, "--models-path", models, "--device", "cpu")

    def run_with(name, content, time):
        file = models / f"clip_finetuned_on_cirr_{name}" / "saved_models" / "tuned_clip_arithmetic.pt"
        file.parent.mkdir(parents=True)
        torch.save(content, file)
        os.utime(file, (time, time))
        return file

    content = torch.load(checkpoint, weights_only=True)
    told = content["hyperparameters"]
    large = {**content, "hyperparameters": {**told, "backbone": "pretrain"}}
    elsewhere = {**content, "hyperparameters": {**told, "digests": {"data_path": "other"}}}
    for number, other in enumerate((large, elsewhere, {"epoch": 1})):
        run_with(f"other{number}", other, 2_000_000_000)
    with pytest.raises(InputError, match=f"trained with --backbone tiny on {demo} is missing.*`make demo`"):
        start(monkeypatch, tmp_path, *flags)
    own = run_with("own", content, 1_000_000_000)
    start(monkeypatch, tmp_path, *flags)
    line = f"indexing {demo}/cirr_dataset/dev with {own}; newer ones are of other data or backbones: 3"
    assert line in capsys.readouterr().out.splitlines()


def test_it_takes_an_index_of_its_own(picture_index, checkpoint, data, tmp_path, monkeypatch):
    moved = shutil.copy(checkpoint, tmp_path / "moved.pt")
    flags = ("--index", picture_index, "--model-path", moved, "--candidates", 50, "--address", "0.0.0.0")
    options, settings = start(monkeypatch, tmp_path, *flags, "--port", 8600)
    assert (options["server.address"], options["server.port"]) == ("0.0.0.0", "8600")
    expected = {"index": str(picture_index), "model_path": str(moved), "candidates": 50, "samples": None}
    assert expected.items() <= settings.items()
    reranker = tmp_path / "reranker.pt"
    save_reranker(reranker, checkpoint)
    rerank = ("--rerank", reranker, "--rerank-top", 7)
    _, settings = start(monkeypatch, tmp_path, *flags, *rerank, "--rerank-weight", 0.25)
    expected = {"rerank": str(reranker), "rerank_top": 7, "rerank_weight": 0.25, "rerank_any": False}
    assert expected.items() <= settings.items()
    for flags, message in (
        (("--index", picture_index, *rerank, "--rerank-weight", 0, 1), "a query takes one"),
        (("--index", tmp_path / "nothing"), "there is no index in .*nothing; make one"),
        (("--data-path", tmp_path / "nothing"), "cirr_dataset/dev is missing.*run `make demo`"),
        (("--index", picture_index, "--port", 0), "--port 0: give a number"),
        (("--index", picture_index, "--candidates", 0), "--candidates 0: give a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            start(monkeypatch, tmp_path, *flags)


def test_what_its_server_sends_waits_for_no_acknowledgement(picture_index, tmp_path, monkeypatch, hooks):
    start(monkeypatch, tmp_path, "--index", picture_index, "--device", "cpu")
    (hook,) = hooks
    with socket.socket() as server, socket.socket() as browser:
        for event in ("open", "socket.bind"):  # of whatever else Python does, nothing
            assert not server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            hook(event, (server, ("127.0.0.1", 0)))
        server.bind(("127.0.0.1", 0))
        server.listen()
        browser.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with socket.socket(socket.AF_UNIX) as other:
        hook("socket.bind", (other, "file"))


def test_a_server_that_is_told_to_stop_ends_as_after_control_c(
    picture_index, checkpoint, tmp_path, monkeypatch
):
    def ends(code):
        def main(_):
            raise SystemExit(code)

        monkeypatch.setattr("streamlit.web.cli.main", main)
        monkeypatch.setattr("sys.argv", ["app.py", "--index", str(picture_index), "--device", "cpu"])
        app.main()

    with pytest.raises(Interrupted, match="SIGINT"):
        ends(0)
    with pytest.raises(SystemExit):
        ends(1)
