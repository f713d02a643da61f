"""Weights of a backbone come from its files whole, or not at all. The files here are made and local."""

import pytest
import torch
from helpers.small_models import VOCABULARY, randomise, small_config

from sprc.config import BACKBONES, ModelConfig, read_backbone
from sprc.data.synthetic.descriptions import words
from sprc.errors import InputError
from sprc.models import factory
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.factory import tokenizer_of

WEIGHTS = {"vit": "https://weights.example/vit.pth", "blip2": "https://weights.example/blip2.pth"}


def build(tokenizer, **changes):
    return Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)


def files_of(model):
    """A ViT's file and BLIP-2's file as published, from a model with random weights."""
    state = model.state_dict()
    vit = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    rest = {
        k: v
        for k, v in state.items()
        if not k.startswith(("visual_encoder.", "prompt_tokens", "gated_fusion."))
    }
    return {WEIGHTS["vit"]: vit, WEIGHTS["blip2"]: {"model": rest}}


@pytest.fixture(params=["eva", "clip"])
def source(request, tokenizer):
    model = build(tokenizer, vit=request.param)
    randomise(model)
    return model


def load(monkeypatch, files, model, weights=WEIGHTS):
    monkeypatch.setattr(factory, "_read", lambda address, _: files[address])
    factory.load_backbone(model, weights)


def test_all_but_the_prompts_and_the_fusion_comes_from_the_files(monkeypatch, tokenizer, source, capsys):
    files = files_of(source)
    files[WEIGHTS["vit"]] |= {"head.weight": torch.ones(2), "blocks.99.norm1.weight": torch.ones(2)}
    model = build(tokenizer, vit=source.config.vit)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    load(monkeypatch, files, model)
    for key, value in model.state_dict().items():
        new = key.startswith(("prompt_tokens", "gated_fusion."))
        assert torch.equal(value, own[key] if new else source.state_dict()[key]), key
    assert "2 entries belong to parts that this model leaves out" in capsys.readouterr().out


def test_one_file_may_hold_the_vit_as_well(monkeypatch, tokenizer, source):
    files = files_of(source)
    whole = files[WEIGHTS["blip2"]]["model"]
    whole |= {f"visual_encoder.{key}": value for key, value in files[WEIGHTS["vit"]].items()}
    model = build(tokenizer, vit=source.config.vit)
    load(monkeypatch, files, model, {"blip2": WEIGHTS["blip2"]})
    for key, value in source.visual_encoder.state_dict().items():
        assert torch.equal(model.visual_encoder.state_dict()[key], value), key


def test_position_embeddings_are_resampled_to_another_image_size(monkeypatch, tokenizer, source):
    model = build(tokenizer, vit=source.config.vit, image_size=24)  # 6 x 6 patches instead of 3 x 3
    load(monkeypatch, files_of(source), model)
    eva = source.config.vit == "eva"
    old = source.visual_encoder.pos_embed[0] if eva else source.visual_encoder.positional_embedding
    new = model.visual_encoder.pos_embed[0] if eva else model.visual_encoder.positional_embedding
    assert torch.equal(new[0], old[0])
    grid = old[1:].T.reshape(1, -1, 3, 3)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", align_corners=not eva)
    torch.testing.assert_close(new[1:], expected.flatten(2)[0].T)


def test_a_parameter_that_is_missing_or_of_another_shape_is_named(monkeypatch, tokenizer, source):
    files = files_of(source)
    del files[WEIGHTS["blip2"]]["model"]["text_proj.bias"]
    files[WEIGHTS["blip2"]]["model"]["itm_head.bias"] = torch.ones(7)
    with pytest.raises(InputError, match=r"1 parameters missing \['text_proj.bias'\].*\['itm_head.bias'\]"):
        load(monkeypatch, files, build(tokenizer, vit=source.config.vit))


def test_weights_that_cannot_be_fetched_say_where_to_put_them(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"cannot fetch https://weights.example/vit.pth .*\(no network\)"):
        factory._read(WEIGHTS["vit"], None)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_s_yaml_makes_a_valid_config(backbone):
    recipe = read_backbone(backbone)
    config = ModelConfig.from_dict(recipe["model"], backbone)
    assert config.freeze_vit
    assert recipe["preprocess"]["vis_processor"]["eval"]["image_size"] == config.image_size
    widths = {"pretrain": 1408, "pretrain_vitL": 1024, "coco": 1408}
    assert config.vit_width == widths.get(backbone, config.vit_width)
    assert set(recipe) <= {"model", "weights", "vocabulary", "preprocess"}  # no key that nothing reads
    assert {"blip2"} <= set(recipe["weights"]) <= {"vit", "blip2", "sha256"}


def test_an_unknown_switch_is_refused():
    with pytest.raises(InputError, match="backbone tiny: unknown model argument vit_deep"):
        factory.create_model(Blip2QformerCirAlignPrompt, "tiny", vit_deep=3)


def test_tiny_s_vocabulary_holds_every_word_of_the_built_in_data_and_spells_others():
    tokenizer = tokenizer_of("tiny")
    for word in words():
        assert tokenizer.tokenize(word) == [word]
    assert tokenizer.tokenize("make the CIRCLE blue") == ["make", "the", "circle", "blue"]
    assert tokenizer.tokenize("zebu") == ["z", "##e", "##b", "##u"]
    assert tokenizer.unk_token not in tokenizer.tokenize("a 7-eleven's façade, (50%) like @home & so on...")
    assert len(tokenizer) == tokenizer.vocab_size + 1 == read_backbone("tiny")["model"]["vocab_size"]
    assert tokenizer.pad_token_id == 0  # the embedding that padding_idx keeps at zero
    assert VOCABULARY[0] == "[PAD]"
