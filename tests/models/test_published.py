"""The registry of published checkpoints, and files of their names and shapes, made here and small."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import plain_model as plain
from helpers.small_models import CAPTIONS, VOCABULARY, random_images, randomise, small_config
from PIL import Image

import sprc
from sprc.errors import InputError
from sprc.models import checkpoint, published
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import STATE, load_checkpoint, start_model
from sprc.models.descendants import CLASSES, Spn4cir, Tme, parameters_of
from sprc.models.hub_folder import CONFIG
from sprc.models.published import list_pretrained

CONFIG_SMALL = small_config(use_gated_fusion=False)
NAMES = [one.name for one in list_pretrained()]


@pytest.fixture(autouse=True)
def backbones(monkeypatch, tokenizer):
    """Both backbones with small widths, and the words of the small models."""
    recipe = {"model": {k: v for k, v in asdict(CONFIG_SMALL).items() if not k.startswith("use_")}}
    monkeypatch.setattr(checkpoint, "read_backbone", lambda name: recipe)
    monkeypatch.setattr(checkpoint, "tokenizer_of", lambda *_: tokenizer)


@pytest.fixture
def models_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def made(kind, tokenizer, seed=2):
    """A model whose parameters are random, those that it starts with as copies, too."""
    model = CLASSES[kind](CONFIG_SMALL, tokenizer).eval()
    randomise(model, seed)
    return model


def write(path, model, **changes):
    """As its authors' code writes it."""
    state = {name: v for name, v in (model.state_dict() | changes).items() if v is not None}
    if isinstance(model, Spn4cir):
        contents = {"epoch": 2, "state_dict": {f"blip_model.{name}": value for name, value in state.items()}}
    else:
        contents = state if isinstance(model, Tme) else {"epoch": 2, STATE: state}
    torch.save(contents, path)
    return path


# --- the registry


def test_each_has_a_name_a_file_and_a_way_to_get_it():
    assert set(NAMES) >= {"sprc-cirr", "sprc-fashioniq", "sprc-cirr-vitl", "sprc-fashioniq-vitl"}
    assert set(NAMES) >= {"spn4cir-cirr", "spn4cir-fashioniq", "tme-cirr", "tme-fashioniq"}
    files = [one.file for one in sprc.list_pretrained()]
    assert len(set(NAMES)) == len(NAMES) == len(set(files))
    for one in list_pretrained():
        assert "https://" in one.how_to_get()
        assert one.file in one.how_to_get()
        assert (one.protocol is None) == (one.metrics == {})
    by_hand = [one.name for one in list_pretrained() if "with a browser" in one.where]
    assert by_hand == [name for name in NAMES if "spn4cir" not in name]


def test_published_figures_are_those_of_the_papers():
    figures = {one.name: tuple(one.metrics.values()) for one in list_pretrained()}
    assert figures == {
        "sprc-cirr": (51.96, 82.12, 80.65, 81.39),
        "sprc-fashioniq": (54.72, 74.97),
        "sprc-cirr-vitl": (50.70, 80.65, 79.59, 80.12),
        "sprc-fashioniq-vitl": (),
        "spn4cir-cirr": (55.06, 83.83, 81.54, 82.69),
        "spn4cir-fashioniq": (56.37, 76.45),
        "tme-cirr": (),
        "tme-fashioniq": (),
    }
    for one in list_pretrained():
        if one.dataset == "cirr" and one.metrics:
            mean = (one.metrics["recall_at5"] + one.metrics["group_recall_at1"]) / 2
            assert one.metrics["mean(R@5+R_s@1)"] == pytest.approx(mean, abs=0.011)


def test_the_parameters_are_sprc_s_and_what_a_descendant_adds():
    different = ("sprc-cirr", "sprc-cirr-vitl", "spn4cir-cirr", "tme-cirr")
    shapes = {name: parameters_of(published.published_as(name)) for name in different}
    for name, width in (("sprc-cirr", 1408), ("sprc-cirr-vitl", 1024)):
        key = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
        assert shapes[name][key] == (768, width)
        assert shapes[name]["prompt_tokens"] == (1, 32, 768)
        assert shapes[name]["text_proj.weight"] == (256, 768)
        assert shapes[name]["Qformer.bert.embeddings.word_embeddings.weight"] == (30523, 768)
    sprc_s = shapes["sprc-cirr"]
    own = {name: shape for name, shape in shapes["tme-cirr"].items() if name not in sprc_s}
    assert own == {"d2t_proj.weight": (1408, 1408), "d2t_proj.bias": (1408,)}
    own = {name: shape for name, shape in shapes["spn4cir-cirr"].items() if name not in sprc_s}
    copies = {
        name.replace("Qformer.", "Qformer_query.", 1): shape
        for name, shape in sprc_s.items()
        if name.startswith("Qformer.")
    }
    assert own == copies | {"text_proj_q.weight": (256, 768), "text_proj_q.bias": (256,)}
    for name in ("spn4cir-cirr", "tme-cirr"):
        assert {key: shapes[name][key] for key in sprc_s} == sprc_s


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_there_says_how_to_get_it(models_folder, name):
    for call in (lambda: sprc.load(name), lambda: load_checkpoint(Path(name))):
        with pytest.raises(InputError) as caught:
            call()
        one = published.published_as(name)
        for part in (name, str(models_folder / one.file), "is missing; download it", "https://"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_there_loads_by_its_name_and_needs_no_backbone(models_folder, tokenizer, name):
    one = published.published_as(name)
    model = made(one.kind, tokenizer)
    file = write(models_folder / one.file, model)
    loaded = load_checkpoint(Path(name.upper()))
    assert f"published as {name}; " in loaded.found
    assert hashlib.sha256(file.read_bytes()).hexdigest() in loaded.found
    assert ("epoch 2" in loaded.found) == (one.kind != "tme")
    assert loaded.source.called["backbone"] == one.backbone
    assert type(loaded.model) is CLASSES[one.kind]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_another_backbone_than_the_published_one_is_refused(models_folder, tokenizer):
    write(models_folder / "sprc_cirr_vitl.pt", made("sprc", tokenizer))
    with pytest.raises(InputError, match=r"--backbone 'pretrain', but .* says 'pretrain_vitL'; leave"):
        load_checkpoint(Path("sprc-cirr-vitl"), backbone="pretrain")


def test_a_checksum_that_is_known_is_compared(models_folder, tokenizer, monkeypatch):
    one = published.published_as("sprc-cirr")
    file = write(models_folder / one.file, made("sprc", tokenizer))
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(published, "PUBLISHED", (replace(one, sha256=right),))
    assert "and the file is as published" in load_checkpoint(Path("sprc-cirr")).found
    monkeypatch.setattr(published, "PUBLISHED", (replace(one, sha256="0" * 64),))
    with pytest.raises(InputError, match=rf"is not sprc-cirr as published: its SHA-256 is {right}"):
        load_checkpoint(Path("sprc-cirr"))


# --- what the descendants compute


def exact(model, images, captions):
    """Queries (B, E) and targets (B, Q, E) by plain functions of the authors' definitions."""
    weights, config = plain.weights_of(model), model.config
    bert = plain.below(weights, "Qformer.bert")
    tokens = plain.image_tokens(weights, config, images.double())
    queries = weights["query_tokens"].expand(len(images), -1, -1)
    ids, mask = plain.token_ids(captions, VOCABULARY, config.max_txt_len)
    mask = mask.double()
    read = plain.target_call(bert, config, queries, tokens)
    prompts, second, projection = read, bert, "text_proj"
    if isinstance(model, Spn4cir):
        fused = plain.fusion_call(bert, config, queries, ids, mask, tokens)
        prompts, projection = fused[:, : config.num_query_tokens], "text_proj_q"
        second = plain.below(weights, "Qformer_query.bert")
    output = plain.sentence_prompt_call(second, config, prompts, ids, mask)
    query = plain.unit(plain.linear(weights, projection, output[:, config.num_query_tokens]))
    return query, plain.unit(plain.linear(weights, "vision_proj", read))


@pytest.mark.parametrize("kind", ["spn4cir", "tme"])
def test_a_descendant_scores_as_its_authors_code_defines_it(tokenizer, tmp_path, kind):
    model = load_checkpoint(write(tmp_path / "any.pt", made(kind, tokenizer)), backbone="pretrain").model
    images = random_images(3, CONFIG_SMALL)
    query, targets = exact(model, images, CAPTIONS)
    features, tokens = model.extract_target_features(images)
    with torch.no_grad():
        found = model.compose(tokens, model.tokenize(CAPTIONS))
    torch.testing.assert_close(found.double(), query, rtol=0, atol=2e-5)
    torch.testing.assert_close(features.double(), targets, rtol=0, atol=2e-5)
    scores = model.inference(tokens, features, CAPTIONS)
    expected = torch.einsum("te,gqe->tgq", query, targets).amax(dim=-1)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-5)
    # SPRC's own arithmetic on the same weights is another.
    as_sprc = Blip2QformerCirAlignPrompt.query_of(
        model,
        Blip2QformerCirAlignPrompt.prompts_of(model, tokens, model.tokenize(CAPTIONS)),
        model.tokenize(CAPTIONS),
    )
    assert (as_sprc - found).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["spn4cir", "tme"])
def test_a_descendant_s_own_parameters_are_named(tokenizer, tmp_path, kind):
    found = load_checkpoint(write(tmp_path / "any.pt", made(kind, tokenizer)), backbone="pretrain").found
    expected = {
        "spn4cir": (
            "SPN4CIR's second stage on SPRC",
            "Qformer_query.* and text_proj_q.*, its own, compute call 2",
        ),
        "tme": ("TME, epoch unknown", "d2t_proj.*, its own, acts in its training alone"),
    }
    for part in expected[kind]:
        assert part in found


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("spn4cir", {"text_proj_q.bias": None}, "1 missing: text_proj_q.bias"),
        ("spn4cir", {"Qformer_query.bert.embeddings.LayerNorm.bias": None}, "1 missing: Qformer_query.bert"),
        ("spn4cir", {"head_stage2.weight": torch.ones(2)}, "1 unexpected: head_stage2.weight"),
        ("sprc", {"text_proj_stage2.weight": torch.ones(2)}, "1 unexpected: text_proj_stage2.weight"),
        ("tme", {"d2t_proj.bias": torch.ones(2)}, "1 of another shape: d2t_proj.bias"),
        ("tme", {"gate.weight": torch.ones(2)}, "1 unexpected: gate.weight"),
    ],
)
def test_a_parameter_that_is_missing_or_one_too_many_is_named_and_refused(
    tokenizer, tmp_path, kind, changes, message
):
    file = write(tmp_path / "any.pt", made(kind, tokenizer), **changes)
    with pytest.raises(InputError, match=message):
        load_checkpoint(file, backbone="pretrain")


def test_an_entry_outside_the_prefix_is_not_dropped(tokenizer, tmp_path):
    file = write(tmp_path / "any.pt", made("spn4cir", tokenizer))
    contents = torch.load(file, weights_only=True)
    contents["state_dict"]["bank"] = torch.ones(3)
    torch.save(contents, file)
    with pytest.raises(InputError, match="1 unexpected: bank"):
        load_checkpoint(file, backbone="pretrain")


@pytest.mark.parametrize("kind", ["spn4cir", "tme"])
def test_no_training_starts_from_a_descendant(tokenizer, tmp_path, kind):
    file = write(tmp_path / "any.pt", made(kind, tokenizer))
    with pytest.raises(
        InputError, match="is scored with here, and not trained; start from a checkpoint of SPRC"
    ):
        start_model("blip2_cir_align_prompt", "pretrain", model_path=file, switches={})


@pytest.mark.parametrize("kind", ["spn4cir", "tme"])
def test_a_descendant_is_saved_as_what_it_is(tokenizer, tmp_path, kind):
    file = write(tmp_path / "any.pt", made(kind, tokenizer))
    model = sprc.load(file, backbone="pretrain", device="cpu")
    again = sprc.load(model.save_pretrained(tmp_path / "out", save_full=True), device="cpu")
    picture = Image.new("RGB", (30, 20), "red")
    assert torch.equal(again.encode_query(picture, CAPTIONS[0]), model.encode_query(picture, CAPTIONS[0]))
    assert again.checkpoint.epoch == model.checkpoint.epoch
    title = {"spn4cir": "SPN4CIR's second stage on SPRC", "tme": "TME"}[kind]
    assert f"This is {title}, with the backbone" in (tmp_path / "out" / "README.md").read_text()
    assert title in (tmp_path / "out" / CONFIG).read_text()
