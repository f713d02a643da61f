"""LAVIS users get the model through LAVIS's own door, ready to train."""

import pytest
import torch
import yaml
from PIL import Image

from sprc.config import BACKBONES, ModelConfig, read_backbone
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.factory import tokenizer_of
from sprc.models.switches import SWITCHES, WORDS
from sprc.models.tokenizer import WordPiece

pytest.importorskip("lavis", reason="LAVIS is not installed")


@pytest.fixture(scope="module")
def loaded():
    from lavis.models import load_model_and_preprocess

    import sprc.lavis_registration  # noqa: F401

    torch.manual_seed(0)
    return load_model_and_preprocess("blip2_cir_align_prompt", "tiny", is_eval=False, device="cpu")


@pytest.mark.slow
def test_load_model_and_preprocess_gives_a_model_that_trains_a_step(loaded):
    model, vis_processors, txt_processors = loaded
    captions = [txt_processors["eval"](text) for text in ("Make the RED circle blue!", "Remove the star.")]
    pictures = [Image.new("RGB", (120, 96), color) for color in ("red", "blue", "green", "white")]
    images = torch.stack([vis_processors["eval"](picture) for picture in pictures])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = model({"image": images[:2], "target": images[2:], "text_input": captions})
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for part in (
        "gated_fusion.gate_mlp.0.weight",
        "Qformer.bert.encoder.layer.0.attention.self.query.weight",
    ):
        assert not torch.equal(before[part], model.get_parameter(part)), part


def test_the_registered_class_is_lavis_s_and_keeps_the_checkpoint_s_name(loaded):
    from lavis.common.registry import registry
    from lavis.models import BaseModel

    model, _, _ = loaded
    assert isinstance(model, BaseModel)
    assert type(model) is registry.get_model_class("blip2_cir_align_prompt")
    assert type(model).__name__ == "Blip2QformerCirAlignPrompt"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lavis_builds_its_processors_from_each_backbone_s_yaml(loaded, backbone):
    from lavis.models import load_preprocess
    from omegaconf import OmegaConf

    config = OmegaConf.load(type(loaded[0]).default_config_path(backbone))
    vis_processors, txt_processors = load_preprocess(config.preprocess)
    size = config.preprocess.vis_processor.eval.image_size
    assert vis_processors["eval"](Image.new("RGB", (50, 40))).shape == (3, size, size)
    assert txt_processors["eval"]("Is RED.") == "is red"
    assert config.model.get("image_size", 224) == size


# What SPRC's scripts load, with strict=False.


@pytest.fixture
def model_of(loaded, tmp_path, monkeypatch):
    """The registered class's `tiny` with these lines in the file of SPRC_SWITCHES; none: no file."""
    monkeypatch.delenv("SPRC_SWITCHES", raising=False)

    def build(**switches):
        if switches:
            path = tmp_path / "switches.yaml"
            path.write_text(yaml.safe_dump(switches))
            monkeypatch.setenv("SPRC_SWITCHES", str(path))
        return (
            type(loaded[0]).from_pretrained("tiny").eval().float()
        )  # as load_model_and_preprocess does on a CPU

    return build


def same(before, model):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def test_a_plain_checkpoint_turns_fusion_off_where_no_switches_are_given(model_of, monkeypatch, capsys):
    plain = model_of(use_gated_fusion=False)
    monkeypatch.delenv("SPRC_SWITCHES")
    model = model_of()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    assert "the checkpoint is plain SPRC, so fusion is off: use_gated_fusion=False" in capsys.readouterr().out
    assert model.gated_fusion is None
    assert not model.config.use_gated_fusion
    assert same(plain.state_dict(), model)
    images, texts = torch.randn(3, 3, 96, 96), ["add a star", "make it red", "remove it"]
    scores = [
        m.inference(m.extract_target_features(images)[1], m.extract_target_features(images)[0], texts)
        for m in (plain, model)
    ]
    assert torch.equal(*scores)


def test_another_model_s_state_dict_is_refused_and_changes_nothing(model_of):
    contextual = model_of(fusion_text="contextual", max_txt_len=20).state_dict()
    values = {"num_layers": 3, "vit_depth": 4, "use_gated_fusion": False}
    config = ModelConfig(**{**read_backbone("tiny")["model"], **values})
    deep = Blip2QformerCirAlignPrompt(config, tokenizer_of("tiny")).state_dict()
    additive = model_of(fusion_strategy="additive", norm_eps=1e-9).state_dict()
    model = model_of(pool="masked")
    own, before = model.state_dict(), snapshot(model)
    unsaid = {key: value for key, value in own.items() if key != SWITCHES}
    plain = {key: value for key, value in own.items() if not key.startswith("gated_fusion.")}
    without = {key: value for key, value in own.items() if key != "vision_proj.bias"}
    cases = (
        (
            contextual,
            "with gated fusion, and not as this model is; write `fusion_text: contextual`, "
            "`max_txt_len: 20` into",
        ),
        (
            deep,
            "is plain SPRC, and not as this model is; write `num_layers: 3`, `use_gated_fusion: false`, "
            "`vit_depth: 4` into",
        ),
        (additive, "write `fusion_strategy: additive`, `norm_eps: 1.0e-09` into"),
        (plain, "is plain SPRC, and not as this model is; write `use_gated_fusion: false` into"),
        (own | {"extra.weight": torch.ones(1)}, "another model than this one (1 unexpected: extra.weight)"),
        (without, "(1 missing: vision_proj.bias)"),
        (own | {"temp": torch.ones(3)}, "(1 of another shape: temp)"),
        (own | {SWITCHES: torch.ones(3)}, f"entry {SWITCHES} cannot be read; it is damaged"),
        ({**unsaid, WORDS: torch.ones(9, 96)}, "the checkpoint's 9 words are not the model's"),
    )
    for state, message in cases:
        for strict in (False, True):
            with pytest.raises(InputError) as caught:
                model.load_state_dict(state, strict=strict)
            assert message in str(caught.value)
            assert "switches.yaml" in str(caught.value) or " write " not in str(caught.value)
    assert same(before, model)


def test_the_same_number_of_other_words_is_refused(model_of):
    model = model_of()
    words = [model.tokenizer.convert_ids_to_tokens(i) for i in range(model.tokenizer.vocab_size)]
    tokenizer = WordPiece([*words[:-1], "unheard"])
    other = Blip2QformerCirAlignPrompt(model.config, tokenizer)
    with pytest.raises(InputError, match="or words of its own"):
        model.load_state_dict(other.state_dict(), strict=False)


def test_what_published_files_and_ours_may_lack_still_loads(model_of, capsys):
    """Constants, and a frozen ViT, which our own checkpoints leave out; older files have no switches."""
    model = model_of(freeze_vit=True)
    source = model_of(freeze_vit=True)
    state = source.state_dict()
    lacking = {key: v for key, v in state.items() if not key.startswith("visual_encoder.")}
    for key in ("Qformer.bert.embeddings.position_ids", SWITCHES):
        del lacking[key]
    vit = snapshot(model.visual_encoder)
    capsys.readouterr()
    model.load_state_dict(lacking, strict=False)
    printed = capsys.readouterr().out
    assert "holds no vision transformer; the backbone's is used" in printed
    assert "does not say its fusion's switches; taken are pool=masked, fusion_text=embeddings" in printed
    assert same(vit, model.visual_encoder)
    assert torch.equal(model.gated_fusion.alpha, source.gated_fusion.alpha)
    assert torch.equal(model.query_tokens, source.query_tokens)
    part = {key: v for key, v in state.items() if key != "visual_encoder.cls_token"}
    with pytest.raises(InputError, match=r"1 missing: visual_encoder.cls_token"):
        model.load_state_dict(part, strict=False)
    trained = model_of(freeze_vit=False)
    with pytest.raises(InputError, match=r"missing: visual_encoder"):
        trained.load_state_dict(lacking, strict=False)


# LAVIS's other doors.


def test_lavis_s_load_checkpoint_reads_sprc_s_files_and_refuses_others(model_of, tmp_path):
    source, model = model_of(), model_of()
    path = tmp_path / "file.pt"
    for contents in (
        {"epoch": 3, "Blip2QformerCirAlignPrompt": source.state_dict()},
        {"model": source.state_dict(), "optimizer": {}},
        source.state_dict(),
    ):
        torch.save(contents, path)
        model = model_of()
        assert not same(source.state_dict(), model)
        model.load_checkpoint(str(path))
        assert same(source.state_dict(), model)
    for contents, message in (
        (
            {"epoch": 3, "Blip2QformerCirCat": source.state_dict()},
            "holds neither Blip2QformerCirAlignPrompt nor",
        ),
        ([1], "holds neither"),
    ):
        torch.save(contents, path)
        with pytest.raises(InputError, match=message):
            model.load_checkpoint(str(path))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="cannot be loaded safely"):
        model.load_checkpoint(str(path))
    with pytest.raises(InputError, match="is missing; give the path"):
        model.load_checkpoint(str(tmp_path / "none.pt"))
    with pytest.raises(InputError, match="weights are loaded by from_pretrained"):
        model.load_from_pretrained("https://example.org/blip2.pth")


def test_lavis_s_from_config_follows_what_it_can_and_refuses_the_rest(loaded, model_of, tmp_path):
    from omegaconf import OmegaConf

    torch.save({"model": model_of(max_txt_len=20, num_query_tokens=4).state_dict()}, tmp_path / "tuned.pth")
    cls = type(loaded[0])
    given = {
        "arch": "blip2_cir_align_prompt",
        "model_type": "tiny",
        "num_query_token": 4,
        "max_txt_len": 20,
        "drop_path_rate": 0,
        "use_grad_checkpoint": False,
        "vit_precision": "fp16",
        "load_finetuned": True,
        "finetuned": str(tmp_path / "tuned.pth"),
    }
    (tmp_path / "switches.yaml").write_text("pool: masked\n")
    model = cls.from_config(OmegaConf.create(given))
    assert (model.config.num_query_tokens, model.config.max_txt_len) == (4, 20)
    assert same(torch.load(tmp_path / "tuned.pth", weights_only=True)["model"], model)
    for changes, message in (
        ({"drop_path_rate": 0.1}, "drop_path_rate: 0.1; this model has 0: leave it out"),
        ({"model_type": None}, "has no model_type; give one of pretrain"),
        ({"model_type": "base"}, "--backbone='base' is unknown"),
        ({"prompt": "a photo of"}, "unknown model argument prompt"),
        ({"pretrained": "https://example.org/other.pth"}, "pretrained: https://example.org/other.pth"),
    ):
        with pytest.raises(InputError, match=message):
            cls.from_config(OmegaConf.create({**given, **changes}))


@torch.no_grad()
def test_lavis_s_extract_features_are_the_model_s_own(model_of):
    model = model_of(pool="masked")
    images, texts = torch.randn(2, 3, 96, 96), ["make the large star blue", "remove it"]
    samples = {"image": images, "text_input": texts}
    features, tokens = model.extract_target_features(images)
    of_images = model.extract_features({"image": images}, mode="image")
    assert torch.equal(of_images.image_embeds_proj, features)
    assert of_images.image_embeds.shape == (2, 4, 96)
    both = model.extract_features(samples).multimodal_embeds
    text = model.tokenize(texts)
    query = model._cls_features(*model._embed_call_2(both, text), text.call_2)
    torch.testing.assert_close(query, model.compose(tokens, text))
    of_text = model.extract_features({"text_input": texts}, mode="text")
    for number, caption in enumerate(texts):
        alone = model.extract_features({"text_input": [caption]}, mode="text")
        length = alone.text_embeds.shape[1]
        for name in ("text_embeds", "text_embeds_proj"):
            whole = getattr(of_text, name)[number]
            torch.testing.assert_close(whole[:length], getattr(alone, name)[0], atol=1e-5, rtol=1e-5)
            assert not whole[length:].any()
    with pytest.raises(InputError, match="mode='both' is unknown; choose from image, text, multimodal"):
        model.extract_features(samples, mode="both")
    with pytest.raises(InputError, match=r"mode='multimodal' needs samples\['image'\]"):
        model.extract_features({"text_input": texts})
