"""Whatever a file or a caption holds, there is a right answer or an error of one line: no traceback, no hang.

The inputs are the same at each run of the suite; FUZZ_EXAMPLES=5000 tries that many new ones a test.
"""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from helpers.small_models import VOCABULARY, random_images, randomise, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sprc.data.captions import process_caption
from sprc.data.cirr import load_cirr
from sprc.data.fashioniq import load_fashioniq, read_annotations
from sprc.data.images import check_images, inspect_images, load_image
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import load_checkpoint, save_checkpoint
from sprc.models.tokenizer import SPECIAL_TOKENS, WordPiece

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
fuzzed = settings(
    max_examples=int(EXAMPLES or 100),
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    # The folder is shared by all examples on purpose: each writes the same files anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(call, *arguments):
    """What the call returns, or the InputError, which must be one line that one can print."""
    try:
        return call(*arguments)
    except InputError as error:
        assert_one_line(str(error))
        return error


def assert_one_line(message):
    assert len(message.splitlines()) == 1
    message.encode()


# --- how things are spoiled ---

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.sampled_from([10**30, 10**400, -1, 0, float("nan"), float("inf"), 1.5]),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "a\x00b", "x" * 100_000, "\u2028", "a\nb", "../..", "/", "\U0001f457"]),
    st.sampled_from(["@deep50@", "@deep900@", "@deep100000@"]),
)
ODD_VALUES = st.one_of(LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(st.text(max_size=4), LEAVES))


def places(content):
    """Every (container, key) inside nested dictionaries and lists."""
    found = []
    for key in content if isinstance(content, dict) else range(len(content)):
        found.append((content, key))
        if isinstance(content[key], dict | list):
            found += places(content[key])
    return found


def mutate(content, draw):
    """A copy of nested dictionaries and lists in which up to four entries differ."""
    content = pickle.loads(pickle.dumps(content))
    for _ in range(draw(st.integers(1, 4))):
        if not (found := places(content)):
            break
        container, key = draw(st.sampled_from(found))
        action = draw(st.sampled_from(["delete", "replace", "replace", "other", "double", "rename"]))
        if action == "delete":
            del container[key]
        elif action == "replace":
            container[key] = draw(ODD_VALUES)
        elif action == "other":
            other, other_key = draw(st.sampled_from(found))
            container[key] = pickle.loads(pickle.dumps(other[other_key]))
        elif action == "double" and isinstance(container, list):
            container.insert(draw(st.integers(0, len(container))), container[key])
        elif action == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=4))] = container.pop(key)
    return content


def mutate_bytes(content, draw):
    """``content`` with up to three of: bits flipped, cut short, bytes lost, bytes added, doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        place = draw(st.integers(0, len(content) - 1))
        action = draw(st.sampled_from(["flip", "flip", "cut", "lose", "add", "double"]))
        if action == "flip":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del content[place:]
        elif action == "lose":
            del content[place : place + draw(st.integers(1, 40))]
        elif action == "add":
            content[place:place] = draw(st.binary(min_size=1, max_size=40))
        else:
            content += content[place:]
    return bytes(content)


def json_bytes(content, draw):
    """``content`` as a file: mostly JSON in UTF-8, at times in other encodings, damaged, with a key twice."""
    text = json.dumps(content, indent=draw(st.sampled_from([None, 1])))
    for depth in (50, 900, 100_000):
        text = text.replace(f'"@deep{depth}@"', "[" * depth + "]" * depth)
    kind = draw(st.sampled_from(["as it is"] * 8 + ["utf-16", "utf-8-sig", "bytes", "bytes", "twice"]))
    if kind == "twice" and (start := text.find("{")) >= 0:
        return f'{text[: start + 1]}"pairid": 1, "pairid": 1, {text[start + 1 :]}'.encode()
    if kind == "bytes":
        return mutate_bytes(text.encode(), draw)
    return text.encode(kind if kind.startswith("utf") else "utf-8")


def loads(content):
    return json.loads(content.decode("utf-8"))


# --- annotations ---


def cirr_split():
    names = [f"val-{number}-img{place}" for number in (0, 1) for place in range(6)]
    entries = [
        {
            "pairid": pair_id,
            "reference": members[reference],
            "target_hard": members[target],
            "target_soft": {members[target]: 1.0},
            "caption": "Make it red.",
            "img_set": {"id": 1, "members": members, "reference_rank": 3},
        }
        for pair_id, members, reference, target in (
            (7, names[:6], 0, 4),
            (3, names[6:], 2, 1),
            (5, names[6:], 1, 2),
        )
    ]
    return entries, {name: f"./dev/{name}.png" for name in names}


@given(data=st.data())
@fuzzed
def test_cirrs_annotations(tmp_path, data):
    entries, images = cirr_split()
    which = data.draw(st.sampled_from(["captions", "images", "both"]))
    if which != "images":
        entries = mutate(entries, data.draw)
    if which != "captions":
        images = mutate(images, data.draw)
    files = {}
    for name, content in (
        ("captions/cap.rc2.val.json", entries),
        ("image_splits/split.rc2.val.json", images),
    ):
        path = tmp_path / "cirr_dataset" / "cirr" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files[name.split("/")[0]] = content = json_bytes(content, data.draw)
        path.write_bytes(content)

    result = outcome(load_cirr, tmp_path, "val")
    problems = []
    rest = load_cirr(tmp_path, "val", problems.append)
    for problem in problems:
        assert_one_line(problem)
    if isinstance(result, InputError):
        assert problems[0] == str(result)
    else:
        assert problems == []
        assert rest == result
        entries = loads(files["captions"])
        assert list(result.image_paths) == list(loads(files["image_splits"]))
        assert [t.pair_id for t in result.triplets] == [entry["pairid"] for entry in entries]
        assert len({t.pair_id for t in result.triplets}) == len(entries) > 0
        assert all(path.is_relative_to(tmp_path / "cirr_dataset") for path in result.image_paths.values())
        for triplet, entry in zip(result.triplets, entries, strict=True):
            assert {*triplet.members} == {*entry["img_set"]["members"]} <= {*result.image_paths}
            assert len(set(triplet.members)) == len(triplet.members)
            assert {triplet.reference, triplet.target} <= {*triplet.members}
            assert (triplet.reference, triplet.target) == (entry["reference"], entry["target_hard"])
            assert triplet.reference != triplet.target
            assert triplet.caption == entry["caption"]
            triplet.caption.encode()


@given(data=st.data())
@fuzzed
def test_fashioniqs_annotations(tmp_path, data):
    names = [f"B00{i}" for i in range(6)]
    entries = [
        {"candidate": names[a], "target": names[b], "captions": ["is red.", "has, no sleeves"]}
        for a, b in ((0, 1), (2, 3), (1, 1))
    ]
    folder = tmp_path / "fashionIQ_dataset" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").touch()
    which = data.draw(st.sampled_from(["captions", "names", "both"]))
    if which != "names":
        entries = mutate(entries, data.draw)
    if which != "captions":
        names = mutate(names, data.draw)
    files = {}
    for name, content in (
        ("captions/cap.dress.val.json", entries),
        ("image_splits/split.dress.val.json", names),
    ):
        path = tmp_path / "fashionIQ_dataset" / name
        path.parent.mkdir(exist_ok=True)
        files[name.split("/")[0]] = content = json_bytes(content, data.draw)
        path.write_bytes(content)

    protocol = data.draw(st.sampled_from(["original", "val-split"]))
    result = outcome(load_fashioniq, tmp_path, "val", "dress", protocol)
    problems = []
    read_annotations(tmp_path, "val", "dress", problems.append)
    for problem in problems:
        assert_one_line(problem)
    if isinstance(result, InputError):
        if problems:
            assert problems[0] == str(result)
        else:
            assert "images have no .png, .jpg or .jpeg file" in str(result)
    else:
        assert problems == []
        entries, names = loads(files["captions"]), loads(files["image_splits"])
        used = {name for t in result.triplets for name in (t.reference, t.target)}
        assert list(result.image_paths) == [n for n in names if protocol == "original" or n in used]
        assert used <= {*result.image_paths}
        assert all(path.is_file() for path in result.image_paths.values())
        assert [(t.reference, t.target) for t in result.triplets] == [
            (entry["candidate"], entry["target"]) for entry in entries
        ]
        assert all(len(t.training_captions) == 4 and t.caption.encode() for t in result.triplets)


# --- images ---


def image_files():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    image = Image.fromarray(pixels[..., :3])
    files = []
    for variant, image_format, options in (
        (image, "PNG", {}),
        (image, "JPEG", {}),
        (image, "JPEG", {"progressive": True}),
        (Image.fromarray(pixels), "PNG", {}),
        (image.quantize(7), "PNG", {"transparency": 2}),
        (image.convert("L"), "JPEG", {}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("1"), "PNG", {}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (image.resize((1, 30)), "PNG", {}),
    ):
        file = io.BytesIO()
        variant.save(file, image_format, **options)
        files.append(file.getvalue())
    return files


IMAGE_FILES = image_files()


@given(data=st.data())
@fuzzed
@pytest.mark.filterwarnings("ignore")
def test_image_files(tmp_path, data):
    content = data.draw(st.sampled_from(IMAGE_FILES))
    if data.draw(st.booleans()):
        content = mutate_bytes(content, data.draw)
    if data.draw(st.integers(0, 4)) == 0:
        content += data.draw(st.sampled_from(IMAGE_FILES))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    kind = data.draw(st.sampled_from(["targetpad", "squarepad"]))
    loaded = outcome(load_image, path, make_transform(kind, 14))
    checked = outcome(check_images, {"image": path}, ["image"])
    decoded = inspect_images([path], decode=True)[0].problem
    if isinstance(loaded, InputError):
        assert decoded == str(loaded)
    else:
        assert loaded.shape == (3, 14, 14)
        assert loaded.dtype == torch.float32
        assert loaded.isfinite().all()
        assert checked is None
        assert decoded is None


# --- captions ---

ODD_CAPTIONS = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Mn"])),
    st.text(st.characters(categories=["Po", "Ps", "Pe", "Sm", "So"])),
    st.text(st.sampled_from("א ب\u202e\u200f שלום مرحبا\u0301")),
    st.lists(st.sampled_from([*VOCABULARY, "\U0001f457", "don't", "é", "\x00", "\ud83d"])).map(" ".join),
    st.sampled_from(
        ["", " ", "\n", "\x00", "\ud800", "\udfff\ud800", '.!"()*#:;~', "red " * 10_000, "x" * 100_000]
    ),
)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def features(model):
    return model.extract_target_features(random_images(3, model.config))


@given(captions=st.lists(ODD_CAPTIONS, min_size=1, max_size=3))
@fuzzed
def test_captions(model, features, captions):
    captions = [process_caption(caption) for caption in captions]
    assert all(len(caption.split(" ")) <= 50 and caption.encode() is not None for caption in captions)
    targets, references = features
    with torch.no_grad():
        similarity = model.inference(references[: len(captions)], targets, captions)
    assert similarity.shape == (len(captions), 3)
    assert similarity.isfinite().all()
    # A caption's score does not depend on what stands beside it, however long that is.
    with torch.no_grad():
        alone = model.inference(references[:1], targets, captions[:1])
    assert torch.allclose(alone, similarity[:1], atol=1e-5)


@given(captions=st.lists(ODD_CAPTIONS.map(process_caption), min_size=1, max_size=4))
@fuzzed
def test_a_vocabulary_of_odd_captions_is_read_back_as_it_was_made(captions):
    words = dict.fromkeys(word for caption in captions for word in caption.split())
    vocabulary = [*SPECIAL_TOKENS, *words]
    tokenizer = WordPiece(vocabulary)
    assert tokenizer.convert_ids_to_tokens(list(range(len(vocabulary)))) == vocabulary
    assert tokenizer.vocab_size == len(vocabulary)
    for caption in captions:
        assert max(tokenizer.encode(caption, 32)) < len(tokenizer)


# --- checkpoints ---

HYPERPARAMETERS = {"blip_model_name": "blip2_cir_align_prompt", "backbone": "tiny", "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "saved.pt"
    save_checkpoint(path, model, 7, HYPERPARAMETERS, full=True)
    return path


@given(data=st.data())
@fuzzed
def test_checkpoints_whose_bytes_are_damaged(tmp_path, model, checkpoint, data):
    path = tmp_path / "damaged.pt"
    path.write_bytes(mutate_bytes(checkpoint.read_bytes(), data.draw))
    loaded = outcome(load_checkpoint, path)
    if not isinstance(loaded, InputError):
        assert loaded.model.config == model.config
        assert loaded.epoch == 7
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])


@given(data=st.data())
@fuzzed
def test_checkpoints_whose_entries_are_changed(tmp_path, model, checkpoint, data):
    contents = torch.load(checkpoint, weights_only=True)
    contents = {key: dict(value) if isinstance(value, dict) else value for key, value in contents.items()}
    parts = [contents, *(value for value in contents.values() if isinstance(value, dict | list) and value)]
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(parts))
        if part:
            key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            tensors = st.sampled_from([torch.zeros(()), torch.zeros(2, 3), torch.tensor([1]), torch.zeros(0)])
            value = data.draw(st.one_of(ODD_VALUES, tensors, st.just(...)))
            if value is ...:
                del part[key]
            else:
                part[key] = value
    path = tmp_path / "changed.pt"
    torch.save(contents, path)
    loaded = outcome(load_checkpoint, path)
    if not isinstance(loaded, InputError):
        assert isinstance(loaded.model, Blip2QformerCirAlignPrompt)
        targets, references = loaded.model.extract_target_features(random_images(1, loaded.model.config))
        assert loaded.model.inference(references, targets, ["red"]).shape == (1, 1)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "entry", ["epoch", "Blip2QformerCirAlignPrompt", "model_config", "vocabulary", "more"]
)
def test_a_payload_in_a_checkpoint_is_never_run(tmp_path, checkpoint, entry, zipped):
    contents = torch.load(checkpoint, weights_only=True)
    owned = tmp_path / "owned"
    contents[entry] = Payload(owned)
    path = tmp_path / "payload.pt"
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    assert isinstance(outcome(load_checkpoint, path), InputError)
    path.write_bytes(pickle.dumps(contents[entry]))
    assert isinstance(outcome(load_checkpoint, path), InputError)
    assert not owned.exists()
    # The payload does work where nothing keeps it from running.
    pickle.loads(path.read_bytes()).close()
    assert owned.exists()
