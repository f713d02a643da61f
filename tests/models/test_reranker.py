"""The re-ranker: its score against a plain restatement, what of it learns, its first stage and its file."""

import math
from dataclasses import asdict

import pytest
import torch
from helpers import plain_model as plain
from helpers.reranking import Pixels, make_first_stage, make_reranker, make_split
from helpers.small_models import CAPTIONS, TOO_LONG, VOCABULARY, random_images, randomise, small_config

import sprc
from sprc.config import RERANKER
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.models.checkpoint import load_checkpoint, save_checkpoint, start_model
from sprc.models.factory import create_model
from sprc.models.reranker import digest_of_weights, load_reranker, start_reranker
from sprc.scoring.encoding import encode_split
from sprc.training.grad_cache import Embedder, GradCache

TEXTS = [*CAPTIONS, TOO_LONG, "a"]
LAYERS = [{}, {"num_layers": 3, "cross_attention_every": 1}, {"num_layers": 3}]


def build(**changes):
    return make_reranker(make_first_stage(**{"use_gated_fusion": False, "dropout": 0.0, **changes}))


def samples_of(model, texts=TEXTS, each=3, seed=5):
    """Prompts, captions, and for each query so many images."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    count = len(texts)
    return {
        "prompts": torch.randn(count, config.num_query_tokens, config.hidden_size, generator=generator),
        "text_input": list(texts),
        "candidates": random_images(count * each, config, seed).unflatten(0, (count, each)),
    }


def restated(model, samples):
    """(B, 1 + K) scores, pair by pair."""
    w, config = plain.weights_of(model), model.config
    rows = []
    for prompts, text, images in zip(*samples.values(), strict=True):
        ids, mask = plain.token_ids([text], VOCABULARY, config.max_txt_len)
        tokens = plain.image_tokens(w, config, images.double())
        rows.append([plain.match(w, config, prompts[None].double(), ids, mask, one[None]) for one in tokens])
    return torch.tensor(rows)


@pytest.mark.numeric
@pytest.mark.parametrize("changes", LAYERS, ids=str)
def test_the_score_is_its_plain_restatement(changes):
    model = build(**changes)
    samples = samples_of(model)
    expected = restated(model, samples).float()
    assert expected.std() > 0.1
    torch.testing.assert_close(model.embed(samples)["scores"], expected, rtol=1e-4, atol=1e-4)


def test_tokens_pixels_and_keys_give_one_score():
    model = build()
    samples = samples_of(model)
    scores = model.embed(samples)["scores"]
    tokens = model.read_images(samples)
    assert tokens["candidates"].shape[:2] == (5, 3)
    assert tokens["candidates"].dim() == 4
    assert model.read_images(tokens) is tokens
    torch.testing.assert_close(model.embed(tokens)["scores"], scores)
    images = model.encode_image(samples["candidates"][:, 1])
    beside = model.beside(samples["prompts"], samples["text_input"])
    torch.testing.assert_close(model.match(images, beside), scores[:, 1], rtol=1e-4, atol=1e-5)
    keys = model.Qformer.bert.image_keys(images)
    torch.testing.assert_close(model.match(keys, beside), scores[:, 1], rtol=1e-4, atol=1e-5)


def test_what_else_is_in_the_batch_changes_no_score():
    model = build()
    samples = samples_of(model)
    scores = model.embed(samples)["scores"]
    for row in range(5):
        alone = {name: values[row : row + 1] for name, values in samples.items()}
        torch.testing.assert_close(model.embed(alone)["scores"], scores[row : row + 1], rtol=1e-4, atol=1e-5)
        turned = {**alone, "candidates": alone["candidates"].flip(1)}
        torch.testing.assert_close(
            model.embed(turned)["scores"].flip(1), scores[row : row + 1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("part", ["prompts", "text_input", "candidates"])
def test_the_score_depends_on_each_part(part):
    model = build()
    samples = samples_of(model, texts=CAPTIONS)
    other = samples_of(model, texts=CAPTIONS[::-1], seed=6)
    changed = model.embed({**samples, part: other[part]})["scores"]
    assert (changed - model.embed(samples)["scores"])[0].abs().max() > 0.01


@pytest.mark.numeric
def test_the_loss_is_minus_the_log_of_the_target_s_share():
    model = build()
    samples = samples_of(model)
    expected = 0.0
    for target, *others in restated(model, samples).tolist():
        shares = [math.exp(score) for score in (target, *others)]
        expected -= math.log(shares[0] / sum(shares)) / 5
    losses = model(samples)
    assert list(losses) == ["loss_itm"]
    assert losses["loss_itm"].item() == pytest.approx(expected, rel=1e-4)
    assert losses["loss_itm"].dim() == 0


@pytest.mark.parametrize("changes", [*LAYERS, {"vit": "clip"}], ids=str)
def test_what_learns_gets_a_gradient_and_what_does_not_is_not_read(changes):
    """DistributedDataParallel waits for all that requires one."""
    model = build(**changes).train()
    samples = samples_of(model)
    model(samples)["loss_itm"].backward()
    named = dict(model.named_parameters())
    assert not [name for name, p in named.items() if p.requires_grad != (p.grad is not None)]
    still = {name: p for name, p in named.items() if not p.requires_grad}
    last = f"Qformer.bert.encoder.layer.{model.config.num_layers - 1}."
    known = ("visual_encoder.", "prompt_tokens", "temp", "vision_proj.", "text_proj.", "Qformer.cls.")
    assert all(name.startswith((*known, f"{last}intermediate.", f"{last}output.")) for name in still)
    assert {name for name in named if name.startswith("itm_head.")} <= named.keys() - still.keys()
    before = model.eval().embed(samples)["scores"]
    with torch.no_grad():
        for name, parameter in still.items():
            if not name.startswith("visual_encoder."):
                parameter.add_(1.0)
    assert torch.equal(model.embed(samples)["scores"], before)


@pytest.mark.numeric
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_gradient_caching_is_exact_with_dropout(chunk):
    model = build(dropout=0.2).double().train()
    samples = samples_of(model)
    samples = {name: x.double() if torch.is_tensor(x) else x for name, x in samples.items()}

    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    torch.manual_seed(4)
    parts = [
        model.embed({name: values[start : start + chunk] for name, values in samples.items()})["scores"]
        for start in range(0, 5, chunk)
    ]
    whole = model.losses_of({"scores": torch.cat(parts)})["loss_itm"]
    whole.backward()
    theirs = gradients()
    torch.manual_seed(4)
    cache = GradCache(model, Embedder(model), chunk, lambda: torch.autocast("cpu", enabled=False))
    losses = cache.losses(samples)
    losses["loss_itm"].backward()
    cache.backward()
    mine = gradients()
    assert losses["loss_itm"].item() == pytest.approx(whole.item(), rel=1e-6)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_mixed_precision_is_close_whatever_the_cache_keeps(kept):
    model = build().train()
    samples = model.read_images(samples_of(model))
    samples = {**samples, "prompts": samples["prompts"].half(), "candidates": samples["candidates"].to(kept)}
    full = model(samples)["loss_itm"]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(samples)["loss_itm"]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.1, abs=0.05)
    half.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- the first stage


@pytest.mark.parametrize("fusion", [True, False])
def test_it_starts_with_the_first_stage_s_weights_and_its_very_vision_transformer(fusion):
    first = make_first_stage(use_gated_fusion=fusion)
    model = start_reranker(first)
    assert model.visual_encoder is first.visual_encoder
    assert asdict(model.config) == {**asdict(first.config), "use_gated_fusion": False}
    state, theirs = model.state_dict(), first.state_dict()
    assert theirs.keys() - state.keys() == {name for name in theirs if name.startswith("gated_fusion.")}
    assert all(torch.equal(value, theirs[name]) for name, value in state.items())
    with torch.no_grad():
        model.itm_head.weight.add_(1.0)
    assert not torch.equal(model.itm_head.weight, first.itm_head.weight)
    model.train()
    assert not model.visual_encoder.training


def test_a_vision_transformer_that_learns_and_a_fusion_of_its_own_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"tokens of a frozen vision transformer; .* first stage learns"):
        start_reranker(make_first_stage(freeze_vit=False))
    with pytest.raises(InputError, match="no fusion of its own: that of its first stage is in the prompts"):
        Blip2QformerCirRerank(small_config(), tokenizer)


@pytest.mark.parametrize("changes", [{}, {"use_gated_fusion": False}, {"fusion_strategy": "select"}], ids=str)
def test_the_prompts_are_the_first_stage_s_with_its_fusion(changes):
    first = make_first_stage(**changes)
    split, load = make_split(), Pixels(first.config)
    encoded = encode_split(first, split, load, batch_size=3, num_workers=0, with_prompts=True)
    assert encoded.prompts.dtype == torch.float16
    w = plain.weights_of(first)
    for number, triplet in enumerate(split.triplets):
        ids, mask = plain.token_ids([triplet.caption], VOCABULARY, first.config.max_txt_len)
        tokens = plain.image_tokens(w, first.config, load.images[triplet.reference][None].double())
        query = plain.compose(w, first.config, tokens, ids, mask)
        torch.testing.assert_close(
            encoded.prompts[number].double(), query.fusion_outputs[0], rtol=2e-3, atol=2e-3
        )
    without = encode_split(first, split, load, batch_size=3, num_workers=0)
    assert without.prompts is None
    assert torch.equal(without.composed, encoded.composed)


# --- checkpoints


def save(path, model, first_stage, name=RERANKER):
    told = {"backbone": "tiny", "blip_model_name": name, "first_stage": digest_of_weights(first_stage)}
    save_checkpoint(path, model, 2, {**told, "first_stage_name": "first.pt"}, full=True)
    return path


@pytest.fixture
def first():
    return make_first_stage()


@pytest.fixture
def saved(first, tmp_path):
    return save(tmp_path / "reranker.pt", make_reranker(first), first)


def test_a_loaded_one_gives_the_same_scores_and_shares_the_vision_transformer(first, saved):
    model, loaded = make_reranker(first), load_reranker(saved, first)
    assert not loaded.training
    assert loaded.visual_encoder is first.visual_encoder
    assert loaded.config == model.config
    samples = samples_of(model)
    assert torch.equal(loaded.embed(samples)["scores"], model.embed(samples)["scores"])


def test_a_vision_transformer_that_its_file_leaves_out_comes_from_the_backbone(tmp_path):
    first = create_model(Blip2QformerCirAlignPrompt, "tiny").eval()
    model = start_reranker(first)
    randomise(model.itm_head)
    told = {"backbone": "tiny", "blip_model_name": RERANKER, "first_stage": digest_of_weights(first)}
    save_checkpoint(tmp_path / "model.pt", model, 0, told)
    save_checkpoint(tmp_path / "first.pt", first, 0, {**told, "blip_model_name": "blip2_cir_align_prompt"})
    loaded_first = load_checkpoint(tmp_path / "first.pt").model
    loaded = load_reranker(tmp_path / "model.pt", loaded_first)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_another_first_stage_is_refused_unless_any_may_be(first, saved):
    other = make_first_stage()
    with torch.no_grad():
        other.gated_fusion.alpha.add_(0.25)  # in the fusion alone
    with pytest.raises(InputError) as caught:
        load_reranker(saved, other)
    told = "is of another first stage, first.pt; give that as --model-path, or add --rerank-any"
    assert str(caught.value) == f"--rerank {saved} {told}"
    assert load_reranker(saved, other, any_first_stage=True).visual_encoder is other.visual_encoder
    load_reranker(saved, make_first_stage())  # which is the same


@pytest.mark.parametrize("any_first_stage", [True, False])
def test_what_cannot_re_rank_for_a_first_stage_is_refused_in_one_line(first, tmp_path, any_first_stage):
    path = tmp_path / "file.pt"
    narrow = make_first_stage(num_query_tokens=6)
    other_vit = make_first_stage()
    with torch.no_grad():
        other_vit.visual_encoder.cls_token.add_(0.1)
    cases = [
        (lambda: path.unlink(), "does not exist; give a checkpoint"),
        (
            # Here, and below, said to be of this first stage: nothing else is in the way.
            lambda: save(path, make_reranker(narrow), first),
            "reads 6 vectors of 16, and the first stage makes 5 of 16; give its own",
        ),
        (
            lambda: save(path, make_reranker(other_vit), first),
            "has another vision transformer than --model-path; give its own",
        ),
        (
            lambda: save(path, first, first, "blip2_cir_align_prompt"),
            f"holds blip2_cir_align_prompt and no re-ranker; train one with --blip-model-name {RERANKER}",
        ),
        (
            lambda: torch.save({"epoch": 1, "Blip2QformerCirAlignPrompt": first.state_dict()}, path),
            "holds an SPRC checkpoint and no re-ranker",
        ),
    ]
    path.touch()
    for spoil, message in cases:
        spoil()
        with pytest.raises(InputError) as caught:
            load_reranker(path, first, any_first_stage=any_first_stage)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_vocabulary_that_does_not_fit_is_refused(first, saved):
    contents = torch.load(saved, weights_only=True)
    contents["vocabulary"] = contents["vocabulary"][:-1]
    torch.save(contents, saved)
    with pytest.raises(InputError, match="vocab_size=22, but its vocabulary makes 21"):
        load_reranker(saved, first)


def test_a_re_ranker_is_no_first_stage(saved):
    for load in (load_checkpoint, sprc.load):
        with pytest.raises(InputError) as caught:
            load(saved)
        assert f"{saved} holds a re-ranker, {RERANKER}" in str(caught.value)
        assert "the re-ranker itself as --rerank" in str(caught.value)
    with pytest.raises(InputError, match=f"--blip-model-name {RERANKER} needs a first stage .*--model-path"):
        start_model(RERANKER, "tiny", switches={})


def test_what_tells_a_first_stage_is_all_of_its_weights_but_the_vision_transformer():
    own = digest_of_weights(make_first_stage())
    assert digest_of_weights(make_first_stage()) == own
    for name in ("prompt_tokens", "temp", "text_proj.bias", "gated_fusion.delta_mlp.0.weight"):
        other = make_first_stage()
        with torch.no_grad():
            dict(other.named_parameters())[name].add_(0.25)
        assert digest_of_weights(other) != own, name
    same_but_vit = make_first_stage()
    with torch.no_grad():
        same_but_vit.visual_encoder.cls_token.add_(0.25)
    assert digest_of_weights(same_but_vit) == own
    assert digest_of_weights(make_first_stage(pool="all")) != own  # the same weights, another fusion
