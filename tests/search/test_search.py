"""Search one's own pictures: the index on disk, what is found in it, and what is refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.runner import run
from helpers.searching import TEXT, make_index, png_header, query, save_model
from PIL import Image, ImageFile

import search as script
from sprc import files
from sprc.data.captions import process_caption
from sprc.data.cirr import load_cirr
from sprc.data.images import load_image
from sprc.data.transforms import make_transform
from sprc.errors import InputError, Interrupted
from sprc.scoring.encoding import encode_split
from sprc.scoring.recall import rank_split
from sprc.search import indexing
from sprc.search.index import open_index, printable
from sprc.search.pictures import read_picture, thumbnail
from sprc.search.searcher import Searcher


@pytest.fixture(scope="module")
def searcher(picture_index):
    return Searcher.open(picture_index)


def only(pattern, folder):
    (file,) = folder.glob(pattern)
    return file


def assert_equals_a_new_one(index, pictures, checkpoint, tmp_path):
    """The same pictures, in the same order, with the same features to the bit."""
    make_index(tmp_path / "new", pictures, checkpoint)
    for pattern in ("vectors-*.bin", "pooled-*.bin"):
        assert only(pattern, index).read_bytes() == only(pattern, tmp_path / "new").read_bytes()
    ours, theirs = open_index(index), open_index(tmp_path / "new")
    assert ours.names == theirs.names
    assert ours.left_out == theirs.left_out
    leftovers = [path.name for path in index.iterdir()]
    assert sorted(leftovers) == sorted(
        [
            "index.json",
            "pictures.json",
            "lock",
            *(only(f"{kind}-*", index).name for kind in ("vectors", "pooled")),
        ]
    )


# --- what is found


def brute_force(searcher, reference, text, names):
    """Score and name of each picture, best first, from files and the model's own calls, in float32."""
    model = searcher.retriever.model
    transform = make_transform("targetpad", 96, 1.25)
    with torch.no_grad():
        tokens = model.encode_image(load_image(searcher.index.folder / reference, transform)[None])
        vector = model.compose(tokens, model.tokenize([process_caption(text)]))[0]
        found = []
        for name in names:
            pixels = load_image(searcher.index.folder / name, transform)[None]
            features = model.target_features(model.encode_image(pixels))[0]
            found.append((max((vector @ feature).item() for feature in features), name))
    return sorted(found, key=lambda pair: -pair[0])


def test_the_terminal_finds_what_brute_force_finds(
    pictures, checkpoint, searcher, tmp_path, capsys, monkeypatch
):
    index = tmp_path / "index"
    given = ["search.py", "index", pictures, "--model-path", checkpoint, "--index", index, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in given])
    script.main()
    printed = capsys.readouterr()
    assert "36 pictures (36 new, 0 changed, 0 removed since the last run; 36 computed)" in printed.out
    assert "SPRC with gated fusion, epoch 3" in printed.err
    image, sheet = pictures / "a" / "dev-0-0-img0.png", tmp_path / "sheet.png"
    flags = ("--image", image, "--text", TEXT, "--top", 7, "--json", "--sheet", sheet)
    stdout, _ = run("search.py", "query", "--index", index, *flags)
    found = json.loads(stdout)
    assert (found["image"], found["text"]) == (str(image), TEXT)
    names = [str(path.relative_to(pictures)) for path in pictures.rglob("*.png") if path != image]
    assert len(names) == 35
    expected = brute_force(searcher, "a/dev-0-0-img0.png", TEXT, names)[:7]
    assert [row["rank"] for row in found["results"]] == list(range(1, 8))
    assert [row["path"] for row in found["results"]] == [str(pictures / name) for _, name in expected]
    scores = [row["score"] for row in found["results"]]
    assert scores == pytest.approx([score for score, _ in expected], abs=2e-3)  # float16
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 600


def test_lines_are_rank_score_and_path(picture_index, pictures, searcher, capsys):
    query(picture_index, top=3, image="b/dev-0-0-img1.png")
    lines = capsys.readouterr().out.splitlines()
    tokens = searcher.encode(searcher.pixels(Image.open(pictures / "b/dev-0-0-img1.png")))
    found = searcher.best(searcher.compose(tokens, TEXT), 3, searcher.copies(name="b/dev-0-0-img1.png"))
    for rank, (line, result) in enumerate(zip(lines, found, strict=True), start=1):
        assert line == f"  {rank}  {result.score:.4f}  {pictures / result.name}"


CHAIN = [("a/dev-0-0-img0.png", TEXT), ("b/dev-0-0-img1.png", "add a green star")]


def test_a_chain_of_rounds_is_searched_by_the_mean_of_their_queries(
    picture_index, pictures, searcher, tmp_path, capsys
):
    last = ("c/dev-0-0-img2.png", "remove the square")
    model, transform = searcher.retriever.model, searcher.retriever.transform
    with torch.no_grad():
        queries = [
            model.compose(
                model.encode_image(load_image(pictures / name, transform)[None]), model.tokenize([text])
            )
            for name, text in (*CHAIN, last)
        ]
    mean = sum(queries)[0] / sum(queries)[0].norm()
    scores = (searcher.index.gallery.float() @ mean).amax(dim=1)
    order = scores.argsort(descending=True).tolist()
    names = searcher.index.names
    expected = [names[row] for row in order if names[row] not in [name for name, _ in (*CHAIN, last)]]
    found = searcher.search(*last, history=CHAIN, top=40)
    assert [result.name for result in found] == expected
    expected_scores = [scores[names.index(name)].item() for name in expected]
    assert [result.score for result in found] == pytest.approx(expected_scores, abs=1e-5)  # of rounding
    assert [result.name for result in searcher.search(*last, top=40)][:5] != expected[:5]
    assert len(searcher.search(*last, history=CHAIN, top=40, keep_reference=True)) == 36
    # PIL images as well; copies of these cannot be known.
    with Image.open(pictures / CHAIN[0][0]) as first:
        mixed = searcher.search(*last, history=[(first, CHAIN[0][1]), CHAIN[1]], top=40)
    assert [result.name for result in mixed if result.name != CHAIN[0][0]] == expected
    query(picture_index, top=3, image=last[0], text=last[1], history=[word for one in CHAIN for word in one])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [str(pictures / name) for name in expected[:3]]


def test_a_round_that_cannot_be_is_named(searcher, picture_index):
    with pytest.raises(InputError, match=r"the text of round 2"):
        searcher.search(*CHAIN[0], history=[CHAIN[0], (CHAIN[1][0], " . ")])
    with pytest.raises(InputError, match=r"the picture of round 1 gone.png is neither a file nor"):
        searcher.search(*CHAIN[0], history=[("gone.png", TEXT)])
    with pytest.raises(InputError, match=r"--history"):
        query(picture_index, history=[CHAIN[0][0], ""])
    with pytest.raises(InputError, match=r"--history gone.png"):
        query(picture_index, history=["gone.png", TEXT])


def test_ranks_are_validation_s(data, searcher):
    split = load_cirr(data, "val")
    retriever = searcher.retriever
    load = indexing.image_loader(retriever.transform)
    options = {"batch_size": 8, "num_workers": 0, "gallery_dtype": "float16"}
    ranking = rank_split(split, encode_split(retriever.model, split, load, **options), k=10)
    names = list(split.image_paths)
    for triplet, row in list(zip(split.triplets, ranking.top.tolist(), strict=True))[:12]:
        image = Image.open(split.image_paths[triplet.reference])
        own = next(name for name in searcher.index.names if name.endswith(f"{triplet.reference}.png"))
        vector = searcher.compose(searcher.encode(searcher.pixels(image)), triplet.caption)
        found = searcher.best(vector, 10, searcher.copies(name=own))
        assert [Path(result.name).stem for result in found] == [names[i] for i in row]


def test_a_reference_and_its_copies_are_left_out_unless_kept(pictures, checkpoint, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    shutil.copy(folder / "a/dev-0-0-img0.png", folder / "copy.png")
    outside = shutil.copy(folder / "a/dev-0-0-img0.png", tmp_path / "outside.png")
    make_index(tmp_path / "index", folder, checkpoint)
    assert (
        "37 pictures (37 new, 0 changed, 0 removed since the last run; 36 computed)"
        in capsys.readouterr().out
    )
    for image in ("copy.png", folder / "copy.png", outside):
        query(tmp_path / "index", image=str(image), top=100)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 35
        assert not any(line.endswith(("a/dev-0-0-img0.png", "copy.png")) for line in lines)
        query(tmp_path / "index", image=str(image), top=100, keep_reference=True)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 37
        # Equal scores stand in the order of the names.
        both = [number for number, line in enumerate(lines) if "copy.png" in line or "img0.png" in line]
        own = [lines[i] for i in both if lines[i].endswith(("/a/dev-0-0-img0.png", "/copy.png"))]
        assert [line.rsplit("/", 1)[1] for line in own] == ["dev-0-0-img0.png", "copy.png"]


def test_strength_scales_the_edit(data, searcher, checkpoint):
    image = Image.open(next((data / "cirr_dataset/dev").iterdir()))
    tokens = searcher.encode(searcher.pixels(image))
    model = Searcher.open(searcher.index.path).retriever.model
    text = model.tokenize([TEXT])
    with torch.no_grad():
        edited, fused = model.compose(tokens, text)[0], model.fuse(tokens, text).fused
        model.gated_fusion = None
        plain = model.compose(tokens, text)[0]
        further = model.compose(2 * fused - tokens, text)[0]
        half = model.compose((tokens + fused) / 2, text)[0]
    assert not torch.allclose(edited, plain, atol=1e-3)
    assert torch.equal(searcher.compose(tokens, TEXT), edited)
    assert torch.equal(searcher.compose(tokens, TEXT, 0.0), plain)
    assert torch.allclose(searcher.compose(tokens, TEXT, 0.5), half, atol=1e-5)
    assert torch.allclose(searcher.compose(tokens, TEXT, 2.0), further, atol=1e-5)


def test_faiss_ranks_its_candidates_exactly(picture_index, searcher):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    vector = searcher.compose(searcher.encode(torch.ones(3, 96, 96)), TEXT)
    exact = searcher.best(vector, 36)
    every = Searcher(searcher.index, searcher.retriever, "faiss", candidates=1000)
    assert every.best(vector, 36) == exact
    assert every.best(vector, 4, [3, 5]) == searcher.best(vector, 4, [3, 5])
    few = Searcher(searcher.index, searcher.retriever, "faiss", candidates=6)
    means = torch.from_numpy(indexing.mean_features(searcher.index.gallery.numpy())).float() @ vector
    nearest = {searcher.index.names[i] for i in means.argsort(descending=True)[:6].tolist()}
    assert few.best(vector, 3) == [result for result in exact if result.name in nearest][:3]


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_a_searcher_outlives_the_index_that_it_was_opened_on(pictures, checkpoint, tmp_path, engine):
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder, index = tmp_path / "pictures", tmp_path / "index"
    shutil.copytree(pictures / "a", folder)
    make_index(index, folder, checkpoint)
    opened = Searcher.open(index, device="cpu", engine=engine)
    expected = Searcher.open(index, device="cpu").search("dev-0-0-img0.png", TEXT)
    shutil.copy(next((pictures / "b").iterdir()), folder / "added.png")
    make_index(index, folder, checkpoint)  # whose files take the place of the old ones
    assert not (index / "pooled-1.bin").exists()
    assert opened.search("dev-0-0-img0.png", TEXT) == expected


def test_a_query_reads_the_index_once(picture_index, monkeypatch):
    reads = []
    own = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or own(path))
    query(picture_index, top=1)
    assert sorted(name for name in reads if name.endswith(".json")) == ["index.json", "pictures.json"]


def test_what_the_model_does_not_read_is_said(picture_index, capsys):
    query(picture_index, text="make it \N{ZEBRA FACE} blue", top=1)
    assert "note: the model does not know: \N{ZEBRA FACE}" in capsys.readouterr().err
    query(picture_index, text="blue " * 40, top=1)
    assert "note: the text is long: the model reads its first 30 word pieces" in capsys.readouterr().err
    query(picture_index, top=1)
    assert "note" not in capsys.readouterr().err


# --- the index


def test_only_what_is_new_or_changed_is_computed(pictures, checkpoint, tmp_path, capsys, monkeypatch):
    folder, index = tmp_path / "pictures", tmp_path / "index"
    shutil.copytree(pictures, folder)
    make_index(index, folder, checkpoint)
    capsys.readouterr()
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (folder / names[0]).unlink()
    (folder / names[1]).rename(folder / "renamed.png")
    shutil.copy(folder / names[2], folder / names[3])
    Image.new("RGB", (50, 70), "red").save(folder / names[4])
    Image.new("RGB", (50, 70), "green").save(folder / "added.webp")
    os.utime(folder / names[5])
    (folder / "broken.png").write_bytes(b"no picture")
    make_index(index, folder, checkpoint)
    out = capsys.readouterr().out
    assert "36 pictures (2 new, 2 changed, 2 removed since the last run; 2 computed)" in out
    assert "broken.png: is not an image in a format that Pillow reads" in out
    assert_equals_a_new_one(index, folder, checkpoint, tmp_path)

    # Pictures that look as before are not even read.
    read = []
    monkeypatch.setattr(files, "SETTLED_NS", -(10**18))
    make_index(index, folder, checkpoint)
    own = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(path.name) or own(path))
    make_index(index, folder, checkpoint)
    assert read == ["broken.png"]


def test_a_killed_run_goes_on(pictures, checkpoint, tmp_path, capsys):
    index = tmp_path / "index"

    def child(computed):
        """Die at the third batch of eight."""
        own, batches = indexing.picture_features, []

        def features(*arguments):
            batches.append(0)
            if len(batches) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*arguments)

        indexing.picture_features = features
        make_index(index, pictures, checkpoint)

    pid = os.fork()
    if pid == 0:
        child(16)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    with pytest.raises(InputError, match=r"is not finished; run `search.py index` again"):
        query(index)
    # A kill within a write, and a disk that lost a page.
    lines = (index / "new.txt").read_text().splitlines(keepends=True)
    assert len(lines) == 16
    (index / "new.txt").write_text("".join(lines) + lines[0][:20])
    with (index / "new.bin").open("r+b") as file:
        file.seek(5 * 4 * 128 * 2)
        file.write(b"damage")
    (index / ".pictures.json.1.tmp").write_text("half")
    capsys.readouterr()
    make_index(index, pictures, checkpoint)
    assert (
        "36 pictures (36 new, 0 changed, 0 removed since the last run; 21 computed)"
        in capsys.readouterr().out
    )
    assert_equals_a_new_one(index, pictures, checkpoint, tmp_path)


def test_control_c_says_how_to_go_on(pictures, checkpoint, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(indexing, "picture_features", interrupt)
    with pytest.raises(Interrupted):
        make_index(tmp_path / "index", pictures, checkpoint)
    assert "the same command goes on from here" in capsys.readouterr().err


def test_damage_is_found_and_repaired(pictures, checkpoint, tmp_path, capsys):
    index = tmp_path / "index"
    make_index(index, pictures, checkpoint)
    for damage in ("flip", "cut", "remove the means"):
        file = only("pooled-*" if "means" in damage else "vectors-*", index)
        if damage == "flip":
            with file.open("r+b") as opened:
                opened.seek(3000)
                opened.write(b"?")
        elif damage == "cut":
            os.truncate(file, file.stat().st_size - 1)
            with pytest.raises(InputError, match=r"is missing or cut short; run `search.py index` again"):
                query(index)
        else:
            file.unlink()
        capsys.readouterr()
        make_index(index, pictures, checkpoint)
        assert f"{'0' if 'means' in damage else '1'} computed" in capsys.readouterr().out
        assert_equals_a_new_one(index, pictures, checkpoint, tmp_path / damage)


def test_what_cannot_be_read_is_listed_and_left_out(pictures, checkpoint, tmp_path, capsys):
    folder, outside = tmp_path / "pictures", tmp_path / "outside"
    shutil.copytree(pictures / "a", folder)
    shutil.copytree(pictures / "b", outside)
    whole = next(outside.iterdir()).read_bytes()
    odd = os.fsdecode(b"odd \xff.png")  # no UTF-8
    shutil.copy(folder / "dev-0-0-img0.png", folder / odd)
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "two\nlines\x1b[31m.gif").write_bytes(b"GIF89a")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(next(outside.iterdir()))
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "linked").symlink_to(outside)
    (folder / "fine.PNG").symlink_to(folder / "dev-0-0-img0.png")
    for name in (".hidden.png", "text.txt"):
        (folder / name).write_bytes(whole)
    (folder / ".trash").mkdir()
    (folder / ".trash" / "old.png").write_bytes(whole)
    make_index(tmp_path / "index", folder, checkpoint)
    out = capsys.readouterr().out
    found = open_index(tmp_path / "index")
    assert found.names == sorted(["fine.PNG", odd, *(path.name for path in (pictures / "a").iterdir())])
    reasons = {
        "empty.jpg": "is empty",
        "cut.png": "cannot be read",
        "bomb.png": "has more than",
        "program.png": "is not an image",
        "two\nlines\x1b[31m.gif": "is not an image",
        "pipe.png": "not a file",
        "link.png": "a link that leads out of the folder",
        "gone.png": "cannot be read",
        "linked": "a link to a folder, not followed",
    }
    assert sorted(found.left_out) == sorted(reasons)
    assert f"left out: {len(reasons)}" in out
    for name, reason in reasons.items():
        assert found.left_out[name].startswith(reason)
        assert f"  {printable(name)}: {reason}" in out
    assert "\x1b" not in out
    assert r"two\nlines\x1b[31m.gif" in out
    flags = {"keep_reference": True, "sheet": tmp_path / "sheet.png", "top": 20}
    query(tmp_path / "index", image="dev-0-0-img0.png", **flags)
    assert "odd \N{REPLACEMENT CHARACTER}.png" in capsys.readouterr().out


def test_pictures_are_seen_as_viewers_turn_them(pictures, checkpoint, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = Image.open(pictures / "a/dev-0-0-img0.png").convert("RGB").crop((0, 0, 96, 60))
    image.save(folder / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    make_index(tmp_path / "index", folder, checkpoint)
    found = open_index(tmp_path / "index")
    assert torch.equal(found.gallery[0], found.gallery[1])
    small = thumbnail(Image.open(folder / "turned.png"), 48)
    assert small.size == (48, 30)


def test_an_index_belongs_to_its_model_and_folder(
    picture_index, pictures, checkpoint, data, tmp_path, capsys
):
    other = save_model(tmp_path / "other.pt", data, 1)
    before = (picture_index / "pictures.json").read_bytes(), only("vectors-*", picture_index).read_bytes()
    with pytest.raises(InputError, match=f"was made by another model .*{checkpoint.name}.* than .*other.pt"):
        make_index(picture_index, pictures, other)
    with pytest.raises(InputError, match="was made by another model"):
        query(picture_index, model_path=other)
    with pytest.raises(InputError, match=r"was made with targetpad 1\.25, not with squarepad"):
        make_index(picture_index, pictures, checkpoint, transform="squarepad")
    with pytest.raises(InputError, match=f"is the index of {pictures}, not of {pictures / 'a'}"):
        make_index(picture_index, pictures / "a", checkpoint)
    with pytest.raises(InputError, match=r"--index .* holds other files \(a\)"):
        make_index(pictures, pictures, checkpoint)
    assert before == (
        (picture_index / "pictures.json").read_bytes(),
        only("vectors-*", picture_index).read_bytes(),
    )
    # The same model elsewhere is the same model.
    moved = shutil.copy(checkpoint, tmp_path / "moved.pt")
    query(picture_index, model_path=moved)

    copy = tmp_path / "index"
    shutil.copytree(picture_index, copy)
    make_index(copy, pictures / "a", other, transform="squarepad", rebuild=True)
    assert "12 pictures (12 new" in capsys.readouterr().out
    assert_equals_a_new_one_of_other(copy, pictures / "a", other, tmp_path)
    # A published checkpoint does not say what it is and how its pictures are prepared: the index remembers.
    make_index(copy, pictures / "a", other, transform="squarepad", backbone="tiny")
    assert open_index(copy).scored_as == {
        "model_path": str(other),
        "blip_model_name": None,
        "backbone": "tiny",
    }
    query(copy, image="dev-0-0-img0.png")
    other.unlink()
    with pytest.raises(InputError, match=r"other\.pt, the model of the index .* is gone; give --model-path"):
        query(copy, image="dev-0-0-img0.png")


def assert_equals_a_new_one_of_other(index, folder, checkpoint, tmp_path):
    make_index(tmp_path / "again", folder, checkpoint, transform="squarepad")
    assert only("vectors-*", index).read_bytes() == only("vectors-*", tmp_path / "again").read_bytes()


def test_links_that_change_later_do_not_lead_out(pictures, checkpoint, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures / "a", folder)
    make_index(tmp_path / "index", folder, checkpoint)
    found = open_index(tmp_path / "index")
    assert found.path_of("dev-0-0-img0.png") == folder / "dev-0-0-img0.png"
    for name in ("../index/index.json", str(tmp_path / "index/index.json"), "nothing.png", ""):
        with pytest.raises(InputError, match="is not in the index"):
            found.path_of(name)
    (folder / "dev-0-0-img0.png").unlink()
    with pytest.raises(InputError, match="is gone"):
        found.path_of("dev-0-0-img0.png")
    (folder / "dev-0-0-img0.png").symlink_to(tmp_path / "index" / "index.json")
    with pytest.raises(InputError, match="now leads out of"):
        found.path_of("dev-0-0-img0.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " .! "}, "--text ' .! ' holds no word"),
        ({"top": 0}, "--top 0: give a whole number of at least 1"),
        ({"candidates": -1}, "--candidates -1: give"),
        ({"image": "nothing.png"}, "--image nothing.png is neither a file nor a picture of the index"),
        ({"image": "/"}, "--image / is a folder"),
        ({"image": __file__}, "is not an image"),
        ({"sheet": Path("/nowhere/sheet.png")}, "--sheet /nowhere/sheet.png: its folder does not exist"),
        ({"sheet": Path("/")}, "--sheet / is a folder; give a file"),
        ({"index": Path("/nowhere")}, "there is no index in /nowhere; make one"),
    ],
)
def test_a_wrong_query_is_refused(picture_index, change, message):
    with pytest.raises(InputError) as caught:
        query(change.pop("index", picture_index), **change)
    assert str(caught.value).find(message) >= 0, str(caught.value)


def test_a_wrong_folder_is_refused(pictures, checkpoint, tmp_path):
    empty, index = tmp_path / "empty", tmp_path / "index"
    empty.mkdir()
    for folder, message in (
        (tmp_path / "no", "does not exist; give a folder of pictures"),
        (checkpoint, "is not a folder"),
        (empty, "holds no picture"),
    ):
        with pytest.raises(InputError, match=message):
            make_index(index, folder, checkpoint)
    (empty / "a.png").touch()
    with pytest.raises(InputError, match=r"none of 1 pictures can be used; first: a.png: is empty"):
        make_index(tmp_path / "other", empty, checkpoint)
    with pytest.raises(InputError, match="--batch-size 0 is too small"):
        make_index(index, pictures, checkpoint, batch_size=0)


@pytest.mark.parametrize("file", ["index.json", "pictures.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 1}', b"\xff", b'{"pictures": [1]}'])
def test_a_damaged_description_is_refused(picture_index, tmp_path, file, content):
    shutil.copytree(picture_index, tmp_path / "index")
    (tmp_path / "index" / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file} is damaged .*--rebuild"):
        open_index(tmp_path / "index")


def test_what_somebody_sent_is_looked_at_before_it_is_decoded(pictures, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing LAVIS does
    good = (pictures / "a/dev-0-0-img0.png").read_bytes()
    assert read_picture(good, 10**6).size == (96, 96)
    for data, message in (
        (png_header(1001, 1000), "the picture has 1001 x 1000 pixels; the most is 1 million"),
        (png_header(60_000, 60_000), "too large"),
        (png_header(10_000, 10_000), "too large"),  # of which Pillow only warns
        (good[:300], "no picture that can be read"),
        (b"", "no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_picture(data, 10**6)
