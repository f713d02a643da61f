"""The package from Python: `sprc.load`, `sprc.Searcher`, and what importing it costs."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, read_csv, run
from PIL import Image

import sprc
from sprc.data.cirr import load_cirr
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.factory import create_model
from sprc.run_folder import find_checkpoint
from sprc.scoring.encoding import encode_split
from sprc.scoring.feature_cache import open_images

TEXT = "make the small circle blue"


@pytest.fixture(scope="module")
def model(trained):
    return sprc.load(trained[0], device="cpu")


@pytest.fixture(scope="module")
def split(data):
    return load_cirr(data, "val")


@pytest.fixture(scope="module")
def encoded(model, split):
    """The queries and the gallery of the validation split, through the package."""
    paths, captions = split.image_paths, [triplet.caption for triplet in split.triplets]
    queries = model.encode_query([paths[t.reference] for t in split.triplets], captions, batch_size=7)
    return queries, model.encode_document(list(paths.values()), batch_size=5)


def test_ranks_are_those_of_the_validation_script(model, split, encoded, trained, data, tmp_path):
    scores = model.similarity(*encoded)
    ranks = []
    names = list(split.image_paths)
    for triplet, row in zip(split.triplets, scores.tolist(), strict=True):
        order = sorted(range(len(names)), key=lambda i: -row[i])
        order.remove(names.index(triplet.reference))
        ranks.append((triplet.pair_id, order.index(names.index(triplet.target))))
    checkpoint = trained[0] / "saved_models" / "tuned_clip_arithmetic.pt"
    flags = ("--dataset", "CIRR", "--data-path", data, "--save-ranks", tmp_path / "ranks.csv")
    run("blip_validate.py", "--model-path", checkpoint, *flags)
    assert [(int(r["pairid"]), int(r["rank"])) for r in read_csv(tmp_path / "ranks.csv")] == ranks


def test_vectors_are_those_of_scoring(model, split, encoded):
    paths = list(split.image_paths.values())
    settings = {"batch_size": 8, "num_workers": 0}
    preprocessing = {"transform": "targetpad", "target_ratio": 1.25}
    load = open_images(
        model.model, preprocessing, paths, feature_cache=None, cache_dtype="float16", **settings
    )
    expected = encode_split(model.model, split, load, **settings)
    assert encoded[0].shape == (len(split.triplets), 128)
    torch.testing.assert_close(encoded[0], expected.composed, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoded[1], expected.gallery, rtol=0, atol=1e-6)


def test_pictures_may_be_one_path_many_or_pil_images(model, split):
    path, other = list(split.image_paths.values())[:2]
    one = model.encode_query(str(path), TEXT)
    assert one.shape == (1, 128)
    many = model.encode_query([path, Image.open(other), str(path)], [TEXT, TEXT, f"  {TEXT.upper()}! "])
    torch.testing.assert_close(many[[0, 2]], one.expand(2, -1), rtol=0, atol=1e-6)
    assert (many[1] - one[0]).abs().max() > 1e-4
    gallery = model.encode_document(Image.open(path))
    assert gallery.shape == (1, *model.encode_document([path, other]).shape[1:])
    best = max((one[0] @ feature).item() for feature in gallery[0])
    assert model.similarity(one, gallery.half()).item() == pytest.approx(best, abs=2e-3)
    assert model.similarity(one, gallery).item() == pytest.approx(best, abs=1e-6)


def test_what_is_saved_loads_again_and_scores_alike(model, split, data, trained, tmp_path):
    told = {"transform": "squarepad"}
    other = sprc.load(trained[0], device="cpu", **told)
    file = other.save_pretrained(tmp_path / "new" / "folder")
    again = sprc.load(tmp_path / "new" / "folder", device="cpu")
    picture = next(iter(split.image_paths.values()))
    wide = Image.open(picture).crop((0, 0, 96, 40))
    assert torch.equal(again.encode_document(wide), other.encode_document(wide))
    assert not torch.equal(again.encode_document(wide), model.encode_document(wide))
    stdout, _ = run("blip_validate.py", "--dataset", "CIRR", "--data-path", data, "--model-path", file)
    assert "recall_at1: " in stdout


def test_a_published_checkpoint_takes_its_backbone_s_name(tmp_path, split):
    """As published: a state dict alone. Its vocabulary is here that of `tiny`."""
    state = create_model(Blip2QformerCirAlignPrompt, "tiny").state_dict()
    torch.save({"epoch": 4, "Blip2QformerCirAlignPrompt": state}, tmp_path / "published.pt")
    with pytest.raises(sprc.InputError, match="does not say which backbone"):
        sprc.load(tmp_path / "published.pt")
    model = sprc.load(tmp_path / "published.pt", backbone="tiny", device="cpu")
    picture = next(iter(split.image_paths.values()))
    again = sprc.load(model.save_pretrained(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.encode_query(picture, TEXT), model.encode_query(picture, TEXT))
    assert "epoch 4" in repr(again)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tuned_clip_arithmetic.pt", "tuned_clip_7.pt"], "tuned_clip_arithmetic.pt"),
        (["tuned_clip_best.pt"], "tuned_clip_best.pt"),
        (["tuned_clip_2.pt", "tuned_clip_10.pt", "training_state.pt"], "tuned_clip_10.pt"),
        (["tuned_clip_arithmetic.pt", "tuned_clip_best.pt"], "holds tuned_clip_arithmetic.pt and tuned_clip"),
        (["training_state.pt"], "holds no checkpoint"),
    ],
)
def test_a_run_folder_s_best_checkpoint_is_taken_else_its_last(tmp_path, names, expected):
    saved = tmp_path / "saved_models"
    saved.mkdir()
    for name in names:
        (saved / name).touch()
    for folder in (tmp_path, saved):
        if expected.endswith(".pt"):
            assert find_checkpoint(folder) == saved / expected
        else:
            with pytest.raises(sprc.InputError, match=expected):
                find_checkpoint(folder)


def wrong_calls(model, good, folder):
    (folder / "broken.png").write_bytes(b"no picture")
    yield lambda: model.encode_query(good, [TEXT, TEXT]), "1 picture and 2 texts; give a text for each"
    yield lambda: model.encode_query([good, good], TEXT), "2 pictures and 1 text;"
    yield lambda: model.encode_query([], []), "images is empty"
    yield lambda: model.encode_document([]), "images is empty"
    yield lambda: model.encode_document([good, None]), "number 1 is a NoneType; give a path or a PIL image"
    yield lambda: model.encode_query("nothing.png", TEXT), "nothing.png does not exist; correct its path"
    yield lambda: model.encode_document(folder / "broken.png"), "broken.png is not an image"
    long = Image.new("1", (100_000, 1))  # padded to a square it would take gigabytes
    yield lambda: model.encode_document([good, long]), "picture 1, a PIL image, has 100000 x 1 pixels; give a"
    yield lambda: model.encode_query([good, good], [TEXT, " .! "]), "text 1 of 2 ' .! ' holds no word"
    yield lambda: model.encode_query(good, 3), "texts is a int; give a text, or a list of them"
    yield lambda: model.encode_query(good, [3]), "texts: number 0 is a int; give a text"
    yield lambda: model.encode_document(good, batch_size=0), "batch_size 0 is too small"
    yield lambda: model.encode_query(good, TEXT, num_workers=-1), "num_workers -1 is too small"
    yield lambda: sprc.Searcher.open(folder, engine="near"), "'near' is unknown; choose from exact, faiss, "
    yield lambda: model.similarity(torch.zeros(128), torch.zeros(1, 4, 128)), "similarity got (128,)"
    yield lambda: model.similarity(torch.zeros(1, 64), torch.zeros(1, 4, 128)), "similarity got (1, 64)"
    yield lambda: sprc.load(folder / "nothing"), "nothing does not exist; give a checkpoint"
    yield lambda: sprc.load(folder), "holds no checkpoint"
    yield lambda: sprc.load(folder / "broken.png", device="cpu"), "cannot be loaded safely"
    yield lambda: sprc.load(folder, device="warp"), "'warp' cannot be used"


def test_a_wrong_call_is_one_clear_line(model, split, tmp_path):
    for call, message in wrong_calls(model, next(iter(split.image_paths.values())), tmp_path):
        with pytest.raises(sprc.InputError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_searcher_takes_text_paths_and_images(picture_index, pictures):
    searcher = sprc.Searcher.open(str(picture_index), device=torch.device("cpu"))
    path = pictures / "a/dev-0-0-img0.png"
    found = searcher.search(str(path), TEXT, top=5)
    assert len(found) == 5
    assert [result.path for result in found] == [pictures / result.name for result in found]
    assert [result.score for result in found] == sorted((r.score for r in found), reverse=True)
    assert searcher.search(path, TEXT, top=5) == found
    assert searcher.search("a/dev-0-0-img0.png", TEXT, top=5) == found  # a name in the index
    image = searcher.search(Image.open(path), TEXT, top=36)
    assert len(image) == 36  # which picture it is cannot be known
    assert [r.name for r in image if r.path != path][:5] == [r.name for r in found]
    assert path in [r.path for r in searcher.search(path, TEXT, top=36, keep_reference=True)]
    for arguments, message in (
        (("nothing.png", TEXT), "nothing.png is neither a file nor a picture of the index"),
        ((path, " . "), "the text ' . ' holds no word"),
        ((Image.new("1", (100_000, 1)), TEXT), "the picture has 100000 x 1 pixels; give a copy of at most"),
    ):
        with pytest.raises(sprc.InputError, match=message):
            searcher.search(*arguments)
    with pytest.raises(sprc.InputError, match="top 0: give a whole number"):
        searcher.search(path, TEXT, top=0)


# --- the package


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_it_imports_nothing_slow(tmp_path):
    code = (
        "import sys, sprc\n"
        "assert {'load', 'Searcher', 'InputError'} <= set(dir(sprc))\n"
        "sprc.InputError\n"
        "slow = {'torch', 'numpy', 'PIL', 'transformers', 'tokenizers', 'matplotlib', 'pandas', 'yaml'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
        "try:\n    sprc.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    result = python(code, tmp_path, PYTHONPATH=str(ROOT / "src"))
    assert result.stdout == "[]\nmodule 'sprc' has no attribute 'nothing'\n", result.stderr


def test_the_wheel_runs_outside_a_checkout(trained, split, tmp_path):
    """Built and unpacked without a network; its dependencies are those of this environment."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    wheel = python(build, source).stdout.split()[-1]
    shutil.unpack_archive(source / wheel, tmp_path / "installed", "zip")
    shutil.rmtree(source)
    picture = str(next(iter(split.image_paths.values())))
    code = f"""
import json, sprc
model = sprc.load({str(trained[0])!r}, device="cpu")
query = model.encode_query({picture!r}, {TEXT!r})
gallery = model.encode_document([{picture!r}])
from sprc.settings import INDEX, ROOT
from pathlib import Path
package = Path(sprc.__file__).parent
names = ("tiny.yaml", "tiny_vocab.txt", "tiny.safetensors")
files = [package / "py.typed", package / "__init__.pyi", *(package / "models" / name for name in names)]
files = [file.is_file() for file in files]
print(json.dumps([sprc.__file__, str(ROOT), str(INDEX), files, model.similarity(query, gallery).tolist()]))
"""
    (tmp_path / "empty").mkdir()
    result = python(code, tmp_path / "empty", PYTHONPATH=str(tmp_path / "installed"))
    assert result.returncode == 0, result.stderr
    file, root, index, files, ((score,),) = json.loads(result.stdout)
    assert file == str(tmp_path / "installed/sprc/__init__.py")
    assert (root, index, files) == (".", "picture_index", [True] * 5)
    assert -1 <= score <= 1
