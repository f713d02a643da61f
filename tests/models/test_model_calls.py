"""The four Q-Former calls and the whole model against tests/helpers/plain_model.py, on small random weights.

In float64, but where a test says otherwise: another formula is seen there at any size, and rounding, which
depends on the processor, is far below what is allowed.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import plain_model as plain
from helpers.small_models import (
    CAPTIONS,
    SMALL,
    TOO_LONG,
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

from sprc.config import ModelConfig
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.qformer import QFormer
from sprc.training.fusion_log import FusionLog

pytestmark = pytest.mark.numeric

CLIP = {"vit": "clip", "vit_mlp_ratio": 4.0}
VARIANTS = {
    "off": {"use_gated_fusion": False},
    "gated": {},
    "gated-all": {"pool": "all"},
    "gated-same-width": {"vit_width": 24, "hidden_size": 24},
    "additive": {"fusion_strategy": "additive"},
    "weighted": {"fusion_strategy": "weighted"},
    "film": {"fusion_strategy": "film"},
    "tirg": {"fusion_strategy": "tirg"},
    "gmu": {"fusion_strategy": "gmu"},
    "cross": {"fusion_strategy": "cross", "fusion_width": 12},
    "cross-contextual": {"fusion_strategy": "cross", "fusion_text": "contextual"},
    "select": {"fusion_strategy": "select", "fusion_width": 12, "fusion_top_k": 3},
    "gated-contextual": {"fusion_text": "contextual"},
    "clip": CLIP,
    "every-layer": {"cross_attention_every": 1},
    "every-third-layer": {"cross_attention_every": 3},
}


def close(ours: Tensor, expected: Tensor) -> None:
    """To 1e-9: a rounding in float64 is 1e-16, and what these layers make of it stays below 1e-12."""
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def images_of(count: int, config: ModelConfig, seed: int = 0) -> Tensor:
    return random_images(count, config, seed).double()


def random_qformer(config: ModelConfig) -> QFormer:
    qformer = build_qformer(config)
    randomise(qformer)
    return qformer.double().eval()


def build_model(tokenizer, **changes: object) -> Blip2QformerCirAlignPrompt:
    model = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)
    randomise(model)
    return model.double().eval()


def plain_text(captions: list[str], config: ModelConfig) -> tuple[Tensor, Tensor]:
    return plain.token_ids(captions, VOCABULARY, config.max_txt_len)


def query_vectors(model: Blip2QformerCirAlignPrompt, reference_embeds: Tensor, text: list[str]) -> Tensor:
    """f, read through `inference`: against a gallery of unit axes the similarities are its entries."""
    axes = torch.eye(model.config.embed_dim, dtype=torch.float64)[:, None, :]
    return model.inference(reference_embeds, axes, text)


def text_only_vectors(model: Blip2QformerCirAlignPrompt, text: list[str]) -> Tensor:
    with torch.no_grad():
        return model.text_features(model.tokenize(text))


# --- the four calls


@pytest.fixture(params=[1, 2, 3], ids=lambda every: f"cross-attention-every-{every}")
def call(request):
    """A Q-Former, its weights in float64, and one batch of inputs."""
    config = small_config(cross_attention_every=request.param)
    generator = torch.Generator().manual_seed(5)
    ids, mask = plain_text(CAPTIONS, config)
    queries = torch.randn(len(CAPTIONS), config.num_query_tokens, config.hidden_size, generator=generator)
    image = torch.randn(len(CAPTIONS), 10, config.vit_width, generator=generator)
    bert = random_qformer(config).bert
    return config, bert, plain.weights_of(bert), queries.double(), ids, mask, image.double()


@pytest.mark.slow
@torch.no_grad()
def test_call_1_fuses_queries_text_and_image(call) -> None:
    config, bert, w, queries, ids, mask, image = call
    expected = plain.fusion_call(w, config, queries.double(), ids, mask, image.double())
    shown = plain.ones_before(mask, queries.shape[1])
    close(call_bert(bert, ids, mask, queries, image), seen(expected, shown))
    first = call_bert(bert, ids, mask, queries, image, wanted=queries.shape[1])
    close(first, expected[:, : queries.shape[1]])


@torch.no_grad()
def test_call_2_reads_the_sentence_prompt_without_an_image(call) -> None:
    config, bert, w, queries, ids, mask, _ = call
    expected = plain.sentence_prompt_call(w, config, queries.double(), ids, mask)
    close(call_bert(bert, ids, mask, queries), seen(expected, plain.ones_before(mask, queries.shape[1])))
    cls = queries.shape[1]
    close(call_bert(bert, ids, mask, queries, wanted=1), expected[:, cls : cls + 1])


@torch.no_grad()
def test_call_3_reads_an_image_without_text(call) -> None:
    config, bert, w, queries, _, _, image = call
    expected = plain.target_call(w, config, queries.double(), image.double())
    close(call_bert(bert, queries=queries, image=image), expected)
    close(call_bert(bert, queries=queries, image=bert.image_keys(image)), expected)


@torch.no_grad()
def test_call_4_puts_the_prompts_behind_cls(call) -> None:
    config, bert, w, queries, ids, mask, _ = call
    expected = plain.text_only_call(w, config, queries.double(), ids, mask)
    shown = plain.ones_before(mask, queries.shape[1])  # [CLS] is always seen, so the same mask fits
    close(call_bert(bert, ids, mask, queries, no_img=True), seen(expected, shown))
    close(call_bert(bert, ids, mask, queries, no_img=True, wanted=1), expected[:, :1])


def test_cross_attention_is_in_every_second_layer() -> None:
    names = random_qformer(small_config(num_layers=5)).state_dict()
    layers = {int(name.split(".")[3]) for name in names if ".crossattention." in name}
    assert layers == {0, 2, 4}


@pytest.mark.parametrize("where", ["attention weights", "elsewhere"])
def test_dropout_acts_in_training_alone(call, where: str) -> None:
    _, bert, _, queries, _, _, image = call
    for module in bert.modules():
        if isinstance(module, nn.Dropout) and where == "attention weights":
            assert module.p == 0.1
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float) and where == "elsewhere":
            assert module.dropout == 0.1
            module.dropout = 0.0

    def run_twice() -> tuple[Tensor, Tensor]:
        return tuple(call_bert(bert, queries=queries, image=image) for _ in range(2))

    bert.train()
    assert not torch.equal(*run_twice())
    bert.eval()
    assert torch.equal(*run_twice())


def test_language_head_shares_the_word_matrix() -> None:
    qformer = random_qformer(small_config())
    head = qformer.cls["predictions"]
    assert head.decoder.weight is qformer.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias


# --- the vision transformers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_vision_transformer_equals_the_plain_one(kind: str) -> None:
    config = small_config(**CLIP) if kind == "clip" else small_config()
    vit = build_vit(config)
    randomise(vit.double())
    image = images_of(2, config)
    plain_vit = plain.clip_vit if kind == "clip" else plain.eva_vit
    ours = vit.eval()(image)
    assert ours.shape == (2, 1 + config.num_patches**2, config.vit_width)
    close(ours, plain_vit(plain.weights_of(vit), config, image.double()))


# --- the whole model


@torch.no_grad()
@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_model_equals_the_plain_one(tokenizer, changes: dict, batch: int) -> None:
    model = build_model(tokenizer, **changes)
    config, w, text = model.config, plain.weights_of(model), CAPTIONS[:batch]
    ids, mask = plain_text(text, config)
    image, target = images_of(batch, config, seed=1), images_of(batch, config, seed=2)

    target_feats, target_embeds = model.extract_target_features(target)
    reference_embeds = model.extract_target_features(image)[1]
    close(target_embeds, plain.image_tokens(w, config, target.double()))
    close(target_feats, plain.target_features(w, config, target.double()))
    assert target_feats.shape == (batch, config.num_query_tokens, config.embed_dim)

    f = plain.compose(w, config, plain.image_tokens(w, config, image.double()), ids, mask).f
    close(query_vectors(model, reference_embeds, text), f)
    close(text_only_vectors(model, text), plain.text_only_query(w, config, ids, mask))

    gallery = images_of(4, config, seed=3)
    close(
        model.inference(reference_embeds, model.extract_target_features(gallery)[0], text),
        plain.similarities(f, plain.target_features(w, config, gallery.double())),
    )
    # A gallery of one keeps its axis as well.
    assert model.inference(reference_embeds, target_feats[:1], text).shape == (batch, 1)

    ours = model({"image": image, "target": target, "text_input": text})
    expected = plain.losses(w, config, image.double(), target.double(), ids, mask)
    assert set(ours) == set(expected)
    for name, loss in ours.items():
        assert loss.shape == ()
        close(loss, expected[name])


@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize(
    "changes", [VARIANTS[name] for name in ("gated", "cross-contextual", "select", "off", "clip")], ids=str
)
@pytest.mark.parametrize("freeze_vit", [False, True], ids=["ViT trained", "ViT frozen"])
def test_gradients_equal_those_of_the_plain_model(
    tokenizer, changes: dict, batch: int, freeze_vit: bool
) -> None:
    model = build_model(tokenizer, freeze_vit=freeze_vit, **changes)
    config = model.config
    image, target = images_of(batch, config, seed=1), images_of(batch, config, seed=2)
    # Each loss its own weight, so that the parts cannot stand in for each other.
    shares = {"loss_itc": 1.0, "loss_rtc": 0.4, "loss_align": 0.7}
    ours = model({"image": image, "target": target, "text_input": CAPTIONS[:batch]})
    sum(share * ours[name] for name, share in shares.items()).backward()

    w = {name: value.requires_grad_() for name, value in plain.weights_of(model).items()}
    ids, mask = plain_text(CAPTIONS[:batch], config)
    expected = plain.losses(w, config, image.double(), target.double(), ids, mask)
    sum(share * expected[name] for name, share in shares.items()).backward()

    for name, parameter in model.named_parameters():
        if freeze_vit and name.startswith("visual_encoder."):
            assert parameter.grad is None
            continue
        theirs = torch.zeros_like(w[name]) if w[name].grad is None else w[name].grad
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = theirs.abs().max().clamp(min=1e-2)
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * scale.item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [VARIANTS[name] for name in ("gated", "cross", "select", "off")], ids=str)
def test_compiled_embeddings_are_the_same_and_their_fusion_is_logged(tokenizer, changes, tmp_path) -> None:
    model = build_model(tokenizer, fusion_dropout=0.0, **changes)
    module = model.gated_fusion or torch.nn.Identity()
    log = FusionLog(module.train(), tmp_path, every=1)
    compiled = torch.compile(model.embed_tokens, dynamic=True, backend="eager")
    tokens = model.vit_tokens(images_of(2 * len(CAPTIONS), model.config))
    for captions in (CAPTIONS, CAPTIONS[:1] * 3):  # of other lengths
        text = model.tokenize(captions)
        log.parts = []
        expected = model.embed_tokens(tokens, text)
        logged, log.parts = log.parts, []
        for name, rows in compiled(tokens, text).items():
            torch.testing.assert_close(rows, expected[name], msg=name)
        torch.testing.assert_close(log.parts, logged)
    assert bool(logged) == (model.gated_fusion is not None)


def test_mixed_precision_scores_in_float32(tokenizer) -> None:
    model = build_model(tokenizer).float()
    samples = {
        "image": random_images(3, model.config, seed=1),
        "target": random_images(3, model.config, seed=2),
        "text_input": CAPTIONS,
    }
    expected = model(samples)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(samples)
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.02)
    assert rounded["loss_itc"] != expected["loss_itc"]


@torch.no_grad()
@pytest.mark.parametrize("changes", [VARIANTS[name] for name in ("gated", "off", "clip")], ids=str)
def test_float32_is_float64_but_for_rounding(tokenizer, changes: dict) -> None:
    model = build_model(tokenizer, **changes)
    samples = {
        "image": random_images(3, model.config, seed=1),
        "target": random_images(3, model.config, seed=2),
        "text_input": CAPTIONS,
    }
    expected = model({name: x.double() if isinstance(x, Tensor) else x for name, x in samples.items()})
    for name, loss in model.float()(samples).items():
        assert loss.dtype == torch.float32
        # A rounding is 6e-8; these few layers and 1 / temp make some 1e-6 of it.
        torch.testing.assert_close(loss.double(), expected[name], rtol=1e-4, atol=1e-4)


def test_tokens_in_place_of_pixels_give_the_same_losses_to_the_bit(tokenizer) -> None:
    """In float32 too, on every processor: a frozen vision transformer's tokens do not depend on the batch."""
    model = build_model(tokenizer).float()
    pixels = {
        "image": random_images(3, model.config, seed=1),
        "target": random_images(3, model.config, seed=2),
        "text_input": CAPTIONS,
    }
    with torch.no_grad():
        tokens = {
            name: torch.cat([model.vit_tokens(image[None]) for image in pixels[name]])
            for name in ("image", "target")
        }
    expected = model(pixels)
    for name, loss in model({**pixels, **tokens}).items():
        assert torch.equal(loss, expected[name])


def test_an_image_that_is_in_no_batch_is_not_taken_for_tokens(tokenizer) -> None:
    model = build_model(tokenizer, image_size=24, vit_width=24)  # a row of pixels is as wide as a token
    with pytest.raises(InputError, match=r"images have the shape \(3, 24, 24\); give a batch"):
        model.encode_image(random_images(1, model.config)[0])


# --- text: padding and truncation


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [VARIANTS[name] for name in ("gated", "weighted", "cross", "select", "off")], ids=str
)
def test_padding_changes_nothing(tokenizer, changes: dict) -> None:
    model = build_model(tokenizer, **changes)
    image = images_of(len(CAPTIONS), model.config)
    reference_embeds = model.extract_target_features(image)[1]

    def results(model: Blip2QformerCirAlignPrompt, rows: slice) -> list[Tensor]:
        text = model.tokenize(CAPTIONS[rows])
        found = [
            query_vectors(model, reference_embeds[rows], CAPTIONS[rows]),
            text_only_vectors(model, CAPTIONS[rows]),
        ]
        if model.gated_fusion is not None:
            found.append(model.fuse(reference_embeds[rows], text).fused)
        return found

    together = results(model, slice(None))
    longer = build_model(tokenizer, **changes, max_txt_len=SMALL["max_txt_len"] + 7)
    longer.load_state_dict(model.state_dict())
    for i in range(len(CAPTIONS)):
        for alone, row in zip(results(model, slice(i, i + 1)), together, strict=True):
            torch.testing.assert_close(alone[0], row[i], rtol=1e-9, atol=1e-9)
    for padded, as_it_was in zip(results(longer, slice(None)), together, strict=True):
        torch.testing.assert_close(padded, as_it_was, rtol=1e-9, atol=1e-9)

    # What the padding's word vector is must not matter either; the second caption has no padding.
    model.Qformer.bert.embeddings.word_embeddings.weight[tokenizer.pad_token_id] = 50.0
    for other, as_it_was in zip(results(model, slice(None)), together, strict=True):
        torch.testing.assert_close(other, as_it_was, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_text_is_cut_at_max_txt_len(tokenizer) -> None:
    model = build_model(tokenizer)
    config, w = model.config, plain.weights_of(model)
    image = images_of(1, config)
    ids, mask = plain_text([TOO_LONG], config)
    assert mask.all()
    assert ids[0, -1] == VOCABULARY.index("[SEP]")
    reference_embeds = model.extract_target_features(image)[1]
    close(
        query_vectors(model, reference_embeds, [TOO_LONG]),
        plain.compose(w, config, plain.image_tokens(w, config, image.double()), ids, mask).f,
    )
    close(text_only_vectors(model, [TOO_LONG]), plain.text_only_query(w, config, ids, mask))


@torch.no_grad()
def test_an_empty_caption_is_cls_and_sep(tokenizer) -> None:
    model = build_model(tokenizer)
    config, w = model.config, plain.weights_of(model)
    image = images_of(1, config)
    ids, mask = plain_text([""], config)
    assert mask.sum() == 2
    f = plain.compose(w, config, plain.image_tokens(w, config, image.double()), ids, mask).f
    close(query_vectors(model, model.extract_target_features(image)[1], [""]), f)


# --- fusion inside the model


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [VARIANTS[name] for name in ("gated", "additive", "weighted", "cross", "select")],
    ids=str,
)
def test_target_tokens_are_never_fused(tokenizer, changes: dict) -> None:
    model = build_model(tokenizer, **changes)
    image, target = images_of(3, model.config, seed=1), images_of(3, model.config, seed=2)
    seen = {"fused": [], "target features": []}
    model.gated_fusion.register_forward_hook(lambda _, inputs, __: seen["fused"].append(inputs[0]))
    model.vision_proj.register_forward_hook(lambda _, __, out: seen["target features"].append(out))
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        model({"image": image, "target": target, "text_input": captions})
    first, second = seen["target features"]
    assert torch.equal(first, second)
    tokens = model.extract_target_features(image)[1]
    for fused in seen["fused"]:
        torch.testing.assert_close(fused, tokens, rtol=1e-9, atol=1e-9)
    assert len(seen["fused"]) == 2


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_what_is_scored_is_what_is_trained(tokenizer, changes: dict) -> None:
    """The similarities of `inference` are those inside `loss_itc`: one query path, fusion included."""
    model = build_model(tokenizer, **changes)
    image, target = images_of(3, model.config, seed=1), images_of(3, model.config, seed=2)
    loss = model({"image": image, "target": target, "text_input": CAPTIONS})["loss_itc"]

    reference_embeds = model.extract_target_features(image)[1]
    target_feats = model.extract_target_features(target)[0]

    def scores_by_inference() -> Tensor:
        return model.inference(reference_embeds, target_feats, CAPTIONS) / model.temp

    scores = scores_by_inference()
    loss_by_inference = F.cross_entropy(scores, torch.arange(3))
    torch.testing.assert_close(loss_by_inference, loss, rtol=1e-9, atol=1e-9)
    if model.gated_fusion is not None:
        model.gated_fusion = None
        assert not torch.allclose(scores_by_inference(), scores, rtol=1e-3)


def test_without_fusion_there_is_no_fusion_parameter(tokenizer) -> None:
    torch.manual_seed(0)
    off = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=False), tokenizer).state_dict()
    torch.manual_seed(0)
    on = Blip2QformerCirAlignPrompt(small_config(), tokenizer).state_dict()
    assert not [name for name in off if "fusion" in name]
    assert set(off) == {name for name in on if not name.startswith("gated_fusion.")}
    assert set(off) < set(on)
    # One seed starts both alike, so that a comparison of the two compares the fusion.
    for name, value in off.items():
        assert torch.equal(value, on[name]), name


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{"fusion_strategy": name, "fusion_start": "identity"} for name in ("gated", "additive", "weighted")]
    + [{"fusion_strategy": name, "fusion_start": "identity"} for name in ("film", "tirg")]
    + [{"fusion_strategy": name} for name in ("cross", "select")],  # which start so by default
    ids=str,
)
def test_identity_start_is_plain_sprc(tokenizer, changes: dict) -> None:
    """Not to the bit in float32: on and off fold ln_vision's scale into the products in two ways.

    The tokens are the same to the bit, and tests/models/test_fusion.py says so.
    """
    off = build_model(tokenizer, use_gated_fusion=False)
    on = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)
    on.double().eval()
    missing, unexpected = on.load_state_dict(off.state_dict(), strict=False)
    assert missing
    assert all(name.startswith("gated_fusion.") for name in missing)
    assert not unexpected
    samples = {
        "image": images_of(3, off.config, seed=1),
        "target": images_of(3, off.config, seed=2),
        "text_input": CAPTIONS,
    }
    expected = off(samples)
    for name, loss in on(samples).items():
        close(loss, expected[name])


# --- what is trained


def trained_names(model: Blip2QformerCirAlignPrompt) -> set[str]:
    """Names of the parameters that a step in training mode sends a gradient to."""
    model.train()
    samples = {
        "image": images_of(3, model.config, seed=1),
        "target": images_of(3, model.config, seed=2),
        "text_input": CAPTIONS,
    }
    sum(model(samples).values()).backward()
    return {
        name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum().item() > 0
    }


def heads_of_blip2(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("itm_head.", "Qformer.cls."))}


@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_frozen_vit_stays_in_eval_mode_and_gets_no_gradient(tokenizer, kind: str) -> None:
    model = build_model(tokenizer, **(CLIP if kind == "clip" else {}))
    names = {name for name, _ in model.named_parameters()}
    trained = trained_names(model)
    assert not any(module.training for module in model.visual_encoder.modules())
    assert model.ln_vision.training
    assert model.Qformer.bert.training
    assert model.gated_fusion.training
    assert not any(p.requires_grad for p in model.visual_encoder.parameters())
    vit = {name for name in names if name.startswith("visual_encoder.")}
    assert vit
    # Everything else learns, but for the heads that no loss reaches. (The language head's word matrix
    # is the embeddings' own.)
    assert trained == names - vit - heads_of_blip2(names)
    assert not any(p.requires_grad for p in model.itm_head.parameters())
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_vit_learns_when_it_is_not_frozen(tokenizer, kind: str) -> None:
    model = build_model(tokenizer, freeze_vit=False, **(CLIP if kind == "clip" else {}))
    names = {name for name, _ in model.named_parameters()}
    assert trained_names(model) == names - heads_of_blip2(names)
    assert all(module.training for module in model.visual_encoder.modules())


def test_scoring_builds_no_graph(tokenizer) -> None:
    model = build_model(tokenizer, freeze_vit=False)
    target_feats, image_embeds = model.extract_target_features(images_of(2, model.config))
    scores = model.inference(image_embeds, target_feats, CAPTIONS[:2])
    assert not any(x.requires_grad for x in (target_feats, image_embeds, scores))
