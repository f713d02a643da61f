"""Our Q-Former and ViTs against LAVIS's own classes: one state dict, loaded strictly by both.

LAVIS's constructors download weights; here their downloads are replaced, and every weight is random.
Skipped where LAVIS is not installed. Small models are compared in float64, where rounding hides nothing on
any processor.
"""

import functools
import itertools
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from helpers import plain_model as plain
from helpers.small_models import (
    CAPTIONS,
    VOCABULARY,
    build_qformer,
    build_vit,
    call_bert,
    random_images,
    randomise,
    seen,
    small_config,
)
from torch import Tensor, nn

from sprc.config import ModelConfig, read_backbone
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt

CLIP = {"vit": "clip", "vit_mlp_ratio": 4.0, "vit_norm_eps": 1e-5}


@pytest.fixture(scope="session")
def lavis() -> Iterator[types.SimpleNamespace]:
    """LAVIS's modules; their import takes ten seconds, once a session."""
    pytest.importorskip("lavis", reason="LAVIS is not installed")
    from lavis.models import clip_vit, eva_vit
    from lavis.models.blip2_models import Qformer, blip2
    from lavis.models.blip2_models.blip2_qformer import Blip2Qformer

    with pytest.MonkeyPatch.context() as patch:
        # LAVIS's own takes whatever it is given to float32, from float64 as well.
        patch.setattr(clip_vit.LayerNorm, "forward", nn.LayerNorm.forward)
        yield types.SimpleNamespace(
            clip_vit=clip_vit, eva_vit=eva_vit, Qformer=Qformer, blip2=blip2, Blip2Qformer=Blip2Qformer
        )


@pytest.fixture
def two_threads():
    """For the models of true size, which a second thread makes faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def lavis_bert_config(lavis, config: ModelConfig):
    return lavis.Qformer.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        layer_norm_eps=config.norm_eps,
        encoder_width=config.vit_width,
        add_cross_attention=True,
        cross_attention_freq=config.cross_attention_every,
        query_length=config.num_query_tokens,
    )


def lavis_vit(lavis, config: ModelConfig) -> nn.Module:
    if config.vit == "clip":
        return lavis.clip_vit.VisionTransformer(
            input_resolution=config.image_size,
            patch_size=config.patch_size,
            width=config.vit_width,
            layers=config.vit_depth + 1,  # LAVIS leaves the last one out
            heads=config.vit_heads,
            use_grad_checkpointing=False,
        )
    return lavis.eva_vit.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vit_width,
        depth=config.vit_depth,
        num_heads=config.vit_heads,
        mlp_ratio=config.vit_mlp_ratio,
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=config.vit_norm_eps),
        use_mean_pooling=False,
    )


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def share_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Random weights for LAVIS's module, then the same for ours, strictly; both in float64."""
    ours.double()
    randomise(theirs.double())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()


def close(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    """To 1e-10 of the largest value in float64, to 1e-4 in float32.

    A rounding is 1e-16 and 6e-8. Products of up to 6,144 terms add up 80 of them at random, some 80 sums
    follow on one another (ViT-g), their errors at random too: 6e-8 * 80 * 9 = 4e-5 of the largest value.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    scale = theirs.abs().max().clamp(min=1).item()
    slack = {torch.float64: 1e-10, torch.float32: 1e-4}[ours.dtype]
    assert (ours - theirs).abs().max().item() <= slack * scale, name


def close_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    reached = 0
    for name, parameter in ours.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
        else:
            close(parameter.grad, expected[name].grad, name)
            reached += 1
    assert reached > 10


def text_of(config: ModelConfig) -> tuple[Tensor, Tensor]:
    return plain.token_ids(CAPTIONS, VOCABULARY, config.max_txt_len)


# --- the Q-Former


@pytest.fixture
def qformers(lavis):
    """Ours, LAVIS's, and inputs for the calls."""
    config = small_config()
    ours, theirs = build_qformer(config), lavis.Qformer.BertLMHeadModel(lavis_bert_config(lavis, config))
    assert shapes(ours) == shapes(theirs)
    share_weights(ours, theirs)
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(len(CAPTIONS), config.num_query_tokens, config.hidden_size, generator=generator)
    image = torch.randn(len(CAPTIONS), 10, config.vit_width, generator=generator)
    return config, ours, theirs, queries.double(), image.double()


@pytest.mark.numeric
@pytest.mark.parametrize("with_text", [True, False], ids=["call 1", "call 3"])
def test_qformer_calls_with_an_image_equal_lavis(qformers, with_text: bool) -> None:
    config, ours, theirs, queries, image = qformers
    arguments = {"query_embeds": queries, "encoder_hidden_states": image}
    if with_text:
        ids, mask = text_of(config)
        shown = plain.ones_before(mask, queries.shape[1])
        mine = call_bert(ours.bert, ids, mask, queries, image)
        arguments |= {"input_ids": ids, "attention_mask": shown}
    else:
        shown = torch.ones(queries.shape[:2])
        mine = call_bert(ours.bert, queries=queries, image=image)
    expected = theirs.bert(**arguments, encoder_attention_mask=torch.ones(image.shape[:2])).last_hidden_state
    expected = seen(expected, shown)
    close(mine, expected)
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(6))
    (mine * upstream).sum().backward()
    (expected * upstream).sum().backward()
    close_gradients(ours, theirs)


@pytest.mark.numeric
@pytest.mark.parametrize("no_img", [False, True], ids=["call 2", "call 4"])
def test_qformer_calls_without_image_equal_lavis_layers_run_as_text(qformers, no_img: bool) -> None:
    """LAVIS has no such calls. Its layers, told that there are no queries, do what SPRC asks for."""
    config, ours, theirs, queries, _ = qformers
    ids, mask = text_of(config)
    mine = call_bert(ours.bert, ids, mask, queries, no_img=no_img)
    mask = plain.ones_before(mask, queries.shape[1])
    bert = theirs.bert
    if no_img:
        words = bert.embeddings.word_embeddings(ids)
        both = torch.cat([words[:, :1], queries, words[:, 1:]], dim=1)
        positions = bert.embeddings.position_embeddings.weight[: both.shape[1]]
        embedded = bert.embeddings.LayerNorm(both + positions)
    else:
        embedded = bert.embeddings(input_ids=ids, query_embeds=queries)
    additive_mask = bert.get_extended_attention_mask(mask, mask.shape, mask.device, False)
    expected = bert.encoder(embedded, additive_mask, head_mask=[None] * config.num_layers).last_hidden_state
    expected = seen(expected, mask)
    close(mine, expected)
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(6))
    (mine * upstream).sum().backward()
    (expected * upstream).sum().backward()
    close_gradients(ours, theirs)


@pytest.mark.numeric
def test_text_alone_equals_lavis(qformers) -> None:
    config, ours, theirs, _, _ = qformers
    ids, mask = text_of(config)
    expected = theirs.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    close(call_bert(ours.bert, ids, mask), seen(expected, mask))


# --- the vision transformers


@pytest.mark.numeric
@pytest.mark.parametrize("changes", [{}, CLIP], ids=["eva", "clip"])
def test_vit_equals_lavis(lavis, changes: dict) -> None:
    config = small_config(**changes)
    ours, theirs = build_vit(config), lavis_vit(lavis, config)
    assert shapes(ours) == shapes(theirs)
    share_weights(ours, theirs)
    image = random_images(2, config).double()
    mine, expected = ours(image), theirs(image)
    close(mine, expected)
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(6))
    (mine * upstream).sum().backward()
    (expected * upstream).sum().backward()
    close_gradients(ours, theirs)


# --- the whole of BLIP-2's first stage


@pytest.mark.numeric
@pytest.mark.parametrize("changes", [{}, CLIP], ids=["eva", "clip"])
def test_target_features_equal_lavis(lavis, tokenizer, monkeypatch, changes: dict) -> None:
    """SPRC's target features are BLIP-2's image features: its model loads our weights less the prompts."""
    config = small_config(**changes, use_gated_fusion=False)

    def init_qformer(*_):
        qformer = lavis.Qformer.BertLMHeadModel(lavis_bert_config(lavis, config))
        return qformer, nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))

    def init_vision_encoder(*_):
        vit = lavis_vit(lavis, config)
        vit.num_features = config.vit_width
        return vit, lavis.blip2.LayerNorm(config.vit_width, eps=config.vision_norm_eps)

    monkeypatch.setattr(lavis.Blip2Qformer, "init_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(lavis.Blip2Qformer, "init_Qformer", init_qformer)
    monkeypatch.setattr(lavis.Blip2Qformer, "init_vision_encoder", init_vision_encoder)
    theirs = lavis.Blip2Qformer(embed_dim=config.embed_dim).eval()
    ours = Blip2QformerCirAlignPrompt(config, tokenizer).eval()
    randomise(ours)
    weights = ours.state_dict()
    del weights["prompt_tokens"]
    theirs.load_state_dict(weights, strict=True)

    image = random_images(2, config)
    with torch.no_grad():
        expected = theirs.extract_features({"image": image}, mode="image").image_embeds_proj
    close(ours.extract_target_features(image)[0], expected)


# --- true shapes, on weights that are slices of one random pool: no gigabytes, no waiting for them


@pytest.fixture
def lavis_without_downloads(lavis, monkeypatch, tmp_path):
    """LAVIS's factories with nothing to fetch and, under the meta device, nothing to fill."""
    nothing = tmp_path / "nothing.pth"
    torch.save({}, nothing)
    fetched = []

    def fetch(url: str, **_: object) -> str:
        fetched.append(url)
        return str(nothing)

    for module in (lavis.eva_vit, lavis.clip_vit):
        monkeypatch.setattr(module, "download_cached_file", fetch)
    monkeypatch.setattr(lavis.Qformer.BertConfig, "from_pretrained", lambda _: lavis.Qformer.BertConfig())
    monkeypatch.setattr(
        lavis.Qformer.BertLMHeadModel,
        "from_pretrained",
        lambda _, config: lavis.Qformer.BertLMHeadModel(config),
    )
    # The drop path rates are read as numbers while the model is built, so they need a real device.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    return types.SimpleNamespace(**vars(lavis), fetched=fetched)


def pooled_weights(module: nn.Module) -> dict[str, Tensor]:
    """For each entry of a meta module's state dict a different view into one pool of random numbers."""
    entries = module.state_dict()
    largest = max(value.numel() for value in entries.values())
    pool = 0.03 * torch.randn(largest + 10**6, generator=torch.Generator().manual_seed(0))
    offsets = itertools.cycle(range(0, 10**6, 7919))
    weights = {}
    for name, value in entries.items():
        if not value.is_floating_point():
            weights[name] = torch.arange(value.numel()).reshape(value.shape)  # position_ids
            continue
        start = next(offsets)
        weights[name] = pool[start : start + value.numel()].reshape(value.shape)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] = 1 + weights[name]
    return weights


def share_true_size_weights(ours: nn.Module, theirs: nn.Module) -> None:
    assert shapes(ours) == shapes(theirs)
    weights = pooled_weights(theirs)
    for module in (ours, theirs):
        module.load_state_dict(weights, strict=True, assign=True)
        module.eval()


def true_config(backbone: str) -> ModelConfig:
    return ModelConfig(**read_backbone(backbone)["model"])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backbone", ["pretrain", "pretrain_vitL"])
def test_vit_of_true_size_equals_lavis(lavis_without_downloads, two_threads, backbone: str) -> None:
    config = true_config(backbone)
    with torch.device("meta"):
        ours = build_vit(config)
        if backbone == "pretrain":
            theirs = lavis_without_downloads.eva_vit.create_eva_vit_g(
                config.image_size, drop_path_rate=0, precision="fp32"
            )
        else:  # LAVIS's own factory builds 21 blocks of this class
            theirs = lavis_vit(lavis_without_downloads, config)
    share_true_size_weights(ours, theirs)
    image = random_images(1, config)
    mine = ours(image)
    assert mine.shape == (1, 257, {"pretrain": 1408, "pretrain_vitL": 1024}[backbone])
    close(mine, theirs(image))


@torch.no_grad()
def test_qformer_of_true_size_equals_lavis(lavis_without_downloads, two_threads) -> None:
    config = true_config("pretrain")
    with torch.device("meta"):
        ours = build_qformer(config)
        theirs, _ = lavis_without_downloads.Blip2Qformer.init_Qformer(config.num_query_tokens, 1408)
        theirs.resize_token_embeddings(config.vocab_size)
    share_true_size_weights(ours, theirs)
    generator = torch.Generator().manual_seed(5)
    queries, image = (
        torch.randn(2, 32, 768, generator=generator),
        torch.randn(2, 257, 1408, generator=generator),
    )
    ids = torch.randint(0, config.vocab_size, (2, 32), generator=generator)
    mask = torch.tensor([[1] * 32, [1] * 9 + [0] * 23])
    image_only = {"query_embeds": queries, "encoder_hidden_states": image}
    mine = call_bert(ours.bert, queries=queries, image=image)
    close(mine, theirs.bert(**image_only).last_hidden_state)
    shown = plain.ones_before(mask, 32)
    both = theirs.bert(**image_only, input_ids=ids, attention_mask=shown).last_hidden_state
    close(call_bert(ours.bert, ids, mask, queries, image), seen(both, shown))


@pytest.mark.parametrize("backbone", ["pretrain", "pretrain_vitL", "coco"])
def test_backbone_is_the_one_of_lavis(lavis_without_downloads, monkeypatch, backbone: str) -> None:
    """Published BLIP-2 and SPRC checkpoints fit: LAVIS's names and shapes, and `prompt_tokens` on top."""
    cls = lavis_without_downloads.Blip2Qformer
    recipe, theirs = (
        read_backbone(backbone),
        yaml.safe_load(Path(cls.default_config_path(backbone)).read_text()),
    )
    config = true_config(backbone)
    if backbone == "pretrain_vitL":
        assert config.vit_depth == 23  # as in SPRC
        config = replace(config, vit_depth=21)  # as in LAVIS
    tokenizer = mock.MagicMock()
    tokenizer.__len__ = lambda _: 30522 + 1  # bert-base-uncased and [DEC]
    tokenizer.convert_ids_to_tokens = lambda ids: list(map(str, ids))
    monkeypatch.setattr(cls, "init_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(cls, "load_checkpoint_from_config", lambda *_: None)
    with torch.device("meta"):
        mine = shapes(Blip2QformerCirAlignPrompt(config, tokenizer))
        expected = shapes(cls.from_config(theirs["model"]))
    assert mine.pop("prompt_tokens") == (1, 32, 768)
    fusion = {name for name in mine if name.startswith("gated_fusion.")}
    assert fusion
    assert {name: shape for name, shape in mine.items() if name not in fusion} == expected

    finetuned = theirs["model"]["load_finetuned"]
    assert recipe["weights"]["blip2"] == theirs["model"]["finetuned" if finetuned else "pretrained"]
    if not finetuned:  # the fine-tuned file holds its own ViT
        assert lavis_without_downloads.fetched == [recipe["weights"]["vit"]]
    for processor, choices in recipe["preprocess"].items():
        assert choices["eval"] == theirs["preprocess"][processor]["eval"]
