"""The feature cache: trainings with it and without, changed images, kills, damage, full disks."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, assert_one_clear_line, read_csv, run, train
from helpers.small_models import randomise, small_config
from PIL import Image

from sprc import files
from sprc.data.images import image_loader
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.scoring.feature_cache import FeatureCache, open_images

PREPROCESSING = {"transform": "targetpad", "target_ratio": 1.25}
SETTINGS = {"batch_size": 3, "num_workers": 0}
FROZEN = ("--freeze-vit", "--save-training", "--save-best")


@pytest.fixture
def model(tokenizer):
    """A model with a frozen vision transformer."""
    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)
    randomise(model)
    return model.eval()


@pytest.fixture
def images(tmp_path):
    """Eight images that differ."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        Image.new("RGB", (14, 12), (30 * number, 200 - 20 * number, 10 + number)).save(path)
    return paths


def expected_tokens(model, path):
    """What the vision transformer says now."""
    transform = make_transform("targetpad", model.config.image_size, 1.25)
    with torch.no_grad():
        return model.vit_tokens(image_loader(transform)(path)[None])[0]


def fill(folder, model, paths, dtype="float32", **preprocessing):
    """A filled cache, and how many images were computed."""
    cache = FeatureCache(folder, model, PREPROCESSING | preprocessing, dtype)
    transform = make_transform("targetpad", model.config.image_size, 1.25)
    return cache, cache.fill(paths, model, transform, **SETTINGS)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cache_gives_what_the_vision_transformer_gives_in_the_stored_type(model, images, tmp_path, dtype):
    cache, computed = fill(tmp_path / "cache", model, images, dtype)
    assert computed == 8
    for path in images:
        tokens = cache(path)
        assert tokens.dtype == getattr(torch, dtype)
        assert torch.equal(tokens, expected_tokens(model, path).to(tokens.dtype))
    again, computed = fill(tmp_path / "cache", model, images, dtype)
    assert computed == 0
    assert all(torch.equal(again(path), cache(path)) for path in images)


@pytest.mark.parametrize("keeps", ["nothing", "size and time"])
def test_a_changed_image_is_computed_again_and_a_renamed_one_is_not(model, images, tmp_path, keeps):
    folder = tmp_path / "cache"
    fill(folder, model, images)
    before, times = images[2].stat(), images[2].stat()
    changed = images[2].read_bytes()
    Image.new("RGB", (14, 12), (255, 0, 255)).save(images[2])
    if keeps == "size and time":
        shorter, longer = sorted((changed, images[2].read_bytes()), key=len)
        padding = b"\0" * (len(longer) - len(shorter))  # bytes behind a PNG's end do no harm
        images[2].write_bytes(images[2].read_bytes() + (padding if len(changed) == len(longer) else b""))
        os.utime(images[2], ns=(times.st_atime_ns, times.st_mtime_ns))
        assert images[2].stat().st_mtime_ns == before.st_mtime_ns
    renamed = images[0].rename(images[0].with_name("renamed.png"))
    paths = [renamed, *images[1:]]
    cache, computed = fill(folder, model, paths)
    assert computed == 1
    for path in paths:
        assert torch.equal(cache(path), expected_tokens(model, path))


def test_a_file_that_did_not_settle_is_read_again_and_a_settled_one_is_not(
    model, images, tmp_path, monkeypatch
):
    reads = []
    original = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda *a: reads.append(a) or original(*a))
    for settled, expected in ((10**18, [8, 8]), (-1, [8, 0])):
        monkeypatch.setattr(files, "SETTLED_NS", settled)
        folder, counts = tmp_path / str(settled), []
        for _ in range(2):
            reads.clear()
            fill(folder, model, images)
            counts.append(len(reads))
        assert counts == expected


def test_other_weights_preprocessing_or_types_have_entries_of_their_own(model, images, tmp_path, tokenizer):
    folder = tmp_path / "cache"
    fill(folder, model, images)
    assert fill(folder, model, images, target_ratio=1.5)[1] == 8
    assert fill(folder, model, images, "float16")[1] == 8
    larger = Blip2QformerCirAlignPrompt(small_config(image_size=16), tokenizer)
    assert fill(folder, larger, images)[1] == 8
    # The smallest change of one weight: what a hash of rounded values would not see.
    weight = model.visual_encoder.blocks[1].attn.proj.weight
    weight.data[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    cache, computed = fill(folder, model, images)
    assert computed == 8
    assert torch.equal(cache(images[0]), expected_tokens(model, images[0]))
    # Anything but the vision transformer may change: what is stored comes before it.
    randomise(model.Qformer, seed=1)
    randomise(model.ln_vision, seed=1)
    assert fill(folder, model, images)[1] == 0


DAMAGE = {
    "a flipped bit": lambda tokens, index: flip(tokens, 5000),
    "tokens cut short": lambda tokens, index: os.truncate(tokens, tokens.stat().st_size - 100),
    "tokens gone": lambda tokens, index: tokens.unlink(),
    "an index line cut short": lambda tokens, index: os.truncate(index, index.stat().st_size - 5),
    "an index of noise": lambda tokens, index: index.write_bytes(
        b"\xff\n x y z\n1 2\n" + index.read_bytes()[9:]
    ),
    "records swapped": lambda tokens, index: swap_records(tokens),
}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def swap_records(path):
    content = path.read_bytes()
    size = len(content) // 8
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_mended(model, images, tmp_path, case):
    folder = tmp_path / "cache"
    cache, _ = fill(folder, model, images)
    DAMAGE[case](cache.store.values, cache.folder / "index.txt")
    mended, computed = fill(folder, model, images)
    assert 1 <= computed <= 8
    for path in images:
        assert torch.equal(mended(path), expected_tokens(model, path))
    assert fill(folder, model, images)[1] == 0


def test_a_foreign_folder_under_the_key_is_refused(model, images, tmp_path):
    cache, _ = fill(tmp_path / "cache", model, images)
    key = cache.folder / "key.json"
    key.write_text(json.dumps(json.loads(key.read_text()) | {"target_ratio": 2.0}))
    with pytest.raises(InputError, match="another key"):
        fill(tmp_path / "cache", model, images)


def test_a_small_disk_is_refused_before_anything_is_computed(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 7000))
    monkeypatch.setattr(model, "vit_tokens", lambda _: pytest.fail("computed"))
    # Eight records of 10 x 24 float32 values are 7,680 bytes.
    with pytest.raises(InputError, match=r"8 images need 0\.00 GB .*are free"):
        fill(tmp_path / "cache", model, images)


def test_tokens_that_overflow_the_stored_type_are_an_error_that_names_another(model, images, tmp_path):
    model.visual_encoder.cls_token.data[0, 0, 0] = 1e6
    with pytest.raises(InputError, match=r"0\.png.*float16; use --cache-dtype bfloat16 or float32"):
        fill(tmp_path / "cache", model, images, "float16")
    assert fill(tmp_path / "cache", model, images, "bfloat16")[1] == 8


def test_an_unreadable_image_is_named_before_anything_is_computed(model, images, tmp_path, monkeypatch):
    images[5].write_bytes(b"no image")
    monkeypatch.setattr(model, "vit_tokens", lambda _: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"5\.png is not an image"):
        fill(tmp_path / "cache", model, images)
    images[5].unlink()
    with pytest.raises(InputError, match=r"5\.png is missing"):
        fill(tmp_path / "cache", model, images)


def test_the_loader_opens_no_image(model, images, tmp_path):
    load = open_images(
        model, PREPROCESSING, images, feature_cache=tmp_path / "cache", cache_dtype="float16", **SETTINGS
    )
    expected = [expected_tokens(model, path).half() for path in images]
    for path in images:
        path.unlink()
    assert all(torch.equal(load(path), tokens) for path, tokens in zip(images, expected, strict=True))


def test_a_bad_image_is_found_whatever_the_paths_come_in(model, images):
    images[3].write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 of 8 images cannot be used; first: .*3\.png"):
        open_images(model, PREPROCESSING, iter(images), feature_cache=None, cache_dtype="float16", **SETTINGS)


# --- the scripts


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Trained on pixels, its vision transformer frozen."""
    return train(data, tmp_path_factory.mktemp("plain"), *FROZEN)[0]


def test_in_float32_a_training_with_the_cache_is_the_one_without_to_the_bit(data, plain, tmp_path):
    cache = ("--feature-cache", tmp_path / "cache", "--cache-dtype", "float32")
    with_cache, stdout, _ = train(data, tmp_path / "filling", *FROZEN, *cache)
    assert "108 images, 108 of them new" in stdout
    filled, stdout, _ = train(data, tmp_path / "filled", *FROZEN, *cache, "--num-workers", 2)
    assert "108 images, 0 of them new" in stdout
    for folder, name in itertools.product(
        (with_cache, filled), ("train_metrics.csv", "validation_metrics.csv")
    ):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    checkpoint = plain / "saved_models" / "tuned_clip_arithmetic.pt"
    for script, extra in (
        ("blip_validate.py", ("--dataset", "CIRR")),
        ("cirr_test_submission.py", ("--name", "x")),
    ):
        outputs = []
        for number, flags in enumerate(((), cache)):
            out = tmp_path / f"{script}{number}"
            extra_out = ("--out", out) if "submission" in script else ("--save-rankings", out)
            run(script, "--model-path", checkpoint, "--data-path", data, *extra, *extra_out, *flags)
            outputs.append([f.read_bytes() for f in (sorted(out.iterdir()) if out.is_dir() else [out])])
        assert outputs[0] == outputs[1]


def test_in_float16_losses_agree_to_float16(data, plain, tmp_path):
    with_cache, _, _ = train(data, tmp_path, *FROZEN, "--feature-cache", tmp_path / "cache")
    for ours, theirs in zip(
        read_csv(with_cache / "train_metrics.csv"), read_csv(plain / "train_metrics.csv"), strict=True
    ):
        for name, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[name]), rel=5e-3)


# With --amp off, float32 and float16 are above.
@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("float32", ("--amp", "bf16")),
        ("float16", ("--amp", "bf16")),
        ("float16", ("--amp", "bf16", "--grad-cache", 8)),
        ("bfloat16", ("--amp", "bf16")),
        ("bfloat16", ("--amp", "off")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_every_type_of_cache_trains_in_every_precision(data, plain, tmp_path, dtype, flags):
    cache = ("--feature-cache", tmp_path / "cache", "--cache-dtype", dtype)
    found, _, _ = train(data, tmp_path, *FROZEN, *cache, *flags)
    (row,), (expected,) = (read_csv(run_folder / "train_metrics.csv") for run_folder in (found, plain))
    assert float(row["loss_itc"]) == pytest.approx(float(expected["loss_itc"]), rel=0.02)
    assert (found / "validation_metrics.csv").exists()


@pytest.mark.parametrize("dataset", ["CIRR", "FashionIQ"])
def test_extraction_fills_ahead_for_all_splits(data, tmp_path, dataset):
    if dataset == "FashionIQ":
        data = tmp_path
        run(
            "make_demo_data.py",
            "--dataset",
            dataset,
            "--out",
            data,
            "--train-families",
            1,
            "--val-families",
            1,
        )
    splits = () if dataset == "CIRR" else ("--splits", "train", "val")
    common = ("--dataset", dataset, "--backbone", "tiny", "--freeze-vit", "--data-path", data)
    cache = ("--feature-cache", tmp_path / "cache", "--num-workers", 0)
    stdout, stderr = run("extract_features.py", *common, *cache, *splits)
    assert "Extracting features" in stderr
    total = int(stdout.split("images, ")[1].split()[0])
    assert f"{total} images, {total} of them new" in stdout
    stdout, stderr = run("extract_features.py", *common, *cache, *splits)
    assert f"{total} images, 0 of them new" in stdout
    assert "Extracting" not in stderr
    flags = ("--num-epochs", 1, "--batch-size", 16, "--models-path", tmp_path / "models")
    stdout, _ = run("blip_fine_tune_2.py", *common, *cache, *flags)
    assert "0 of them new" in stdout


@pytest.mark.slow
def test_a_killed_extraction_goes_on_where_it_was(data, tmp_path):
    arguments = ("--dataset", "CIRR", "--backbone", "tiny", "--freeze-vit", "--data-path", data)
    arguments += ("--feature-cache", tmp_path / "cache", "--num-workers", 0, "--batch-size", 1)
    command = [sys.executable, str(ROOT / "src" / "extract_features.py"), *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def lines():
        return sum(file.read_bytes().count(b"\n") for file in tmp_path.glob("cache/*/index.txt"))

    deadline = time.monotonic() + 120
    while lines() < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = lines()
    assert 5 <= kept < 144
    stdout, _ = run("extract_features.py", *arguments)
    assert f"144 images, {144 - kept} of them new" in stdout


WRONG = {
    "a trained vision transformer": (("--no-freeze-vit",), "this model's vision transformer is trained"),
    "a file for a folder": (("--freeze-vit", "--feature-cache", __file__), "cannot be used"),
    "a ratio below one": (("--freeze-vit", "--target-ratio", "0.5"), "--target-ratio 0.5"),
    "an empty batch": (("--freeze-vit", "--batch-size", "0"), "--batch-size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(data, tmp_path, case):
    flags, message = WRONG[case]
    common = ("--dataset", "CIRR", "--backbone", "tiny", "--data-path", data)
    _, stderr = run("extract_features.py", *common, "--feature-cache", tmp_path / "c", *flags, code=2)
    assert_one_clear_line(stderr, message)
