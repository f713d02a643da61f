"""Gradient caching against the whole graph: with dropout, in mixed precision, with every kind of model.

In float64, but for mixed precision: other chunks are other products, whose rounding depends on the processor.
"""

import pytest
import torch
from helpers.runner import read_csv
from helpers.small_models import random_images, randomise, small_config

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.training.fusion_log import FusionLog
from sprc.training.grad_cache import Embedder, GradCache, split

pytestmark = pytest.mark.numeric

TEXTS = ["remove the square", "make the small circle in the top", "a star", "add a green star", "red"]
DROPOUT = {"dropout": 0.2, "fusion_dropout": 0.2}
MODELS = {
    "gated": {},
    "off": {"use_gated_fusion": False},
    "trained ViT": {"freeze_vit": False},
    "contextual text": {"fusion_text": "contextual"},
    "film": {"fusion_strategy": "film"},
}


def build(tokenizer, **changes):
    model = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)
    randomise(model)
    return model.double().train()


def batch(model):
    image, target = random_images(2 * len(TEXTS), model.config).to(model.temp.dtype).chunk(2)
    return {"image": image, "target": target, "text_input": TEXTS}


def total_of(losses):
    weights = {"loss_rtc": 0.4, "loss_align": 0.3, "loss_rtc_complementary": 0.5}
    return sum(weights.get(name, 1.0) * loss for name, loss in losses.items())


def full_precision():
    return torch.autocast("cpu", enabled=False)


def cached(model, samples, chunk, precision=full_precision, scale=1.0):
    """Losses, and gradients by name."""
    cache = GradCache(model, Embedder(model), chunk, precision)
    with precision():
        losses = cache.losses(samples)
        total = total_of(losses)
    (scale * total).backward()
    cache.backward()
    return losses, gradients(model)


def whole_graph(model, samples, chunk, precision=full_precision):
    """The same chunks, and the same random numbers, in one graph."""
    with precision():
        parts = [model.embed(part) for part in split(samples, chunk)]
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "temp"}
        losses = model.losses_of({**rows, "temp": model.temp})
        total = total_of(losses)
    total.backward()
    return losses, gradients(model)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(mine, theirs, rtol=1e-8, atol=1e-10):
    assert list(mine[0]) == list(theirs[0])
    for name, loss in theirs[0].items():
        torch.testing.assert_close(mine[0][name], loss, rtol=rtol, atol=atol, msg=name)
    assert set(mine[1]) == set(theirs[1])
    for name, gradient in theirs[1].items():
        slack = atol * max(gradient.abs().max().item(), 1)
        torch.testing.assert_close(mine[1][name], gradient, rtol=rtol, atol=slack, msg=name)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_it_is_exact_with_dropout(tokenizer, changes):
    model = build(tokenizer, **changes, **DROPOUT)
    samples = batch(model)
    torch.manual_seed(4)
    theirs = whole_graph(model, samples, 2)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    mine = cached(model, samples, 2)
    assert_same(mine, theirs)
    assert torch.equal(torch.get_rng_state(), after)  # so a cached step goes on as the other would
    torch.manual_seed(5)
    assert whole_graph(model, samples, 2)[0]["loss_itc"] != theirs[0]["loss_itc"]


def test_the_complementary_losses_pass_through(tokenizer):
    model = build(tokenizer, dropout=0.0, fusion_dropout=0.0)
    model.contrast = "complementary"
    samples = batch(model)
    mine, theirs = cached(model, samples, 2), whole_graph(model, samples, 5)
    assert len(mine[0]) == 5
    assert_same(mine, theirs)
    model.contrast = "infonce"
    assert len(whole_graph(model, samples, 5)[0]) == 3


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("changes", [MODELS["gated"], MODELS["off"]], ids=["on", "off"])
def test_without_dropout_it_is_the_plain_step(tokenizer, changes, chunk):
    model = build(tokenizer, **changes, dropout=0.0, fusion_dropout=0.0)
    samples = batch(model)
    losses = model(samples)
    (losses["loss_itc"] + 0.4 * losses["loss_rtc"] + 0.3 * losses["loss_align"]).backward()
    theirs = losses, gradients(model)
    assert_same(cached(model, samples, chunk), theirs)


def test_mixed_precision_and_a_scaled_loss_pass_through(tokenizer):
    model = build(tokenizer, **DROPOUT).float()
    samples = batch(model)

    def bfloat16():
        return torch.autocast("cpu", torch.bfloat16)

    torch.manual_seed(4)
    theirs = whole_graph(model, samples, 2, bfloat16)
    torch.manual_seed(4)
    losses, scaled = cached(model, samples, 2, bfloat16, scale=64.0)
    assert_same((losses, {name: value / 64 for name, value in scaled.items()}), theirs, rtol=0.05, atol=0.02)


def test_both_passes_run_the_same_kernels(tokenizer):
    """With a graph and under the same autocast: a compiled model draws its random numbers by its graph."""
    model = build(tokenizer).float()
    seen, embed = [], model.embed

    def watched(samples):
        seen.append((len(samples["text_input"]), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return embed(samples)

    model.embed = watched
    cached(model, batch(model), 2, lambda: torch.autocast("cpu", torch.bfloat16))
    assert seen == [(rows, True, True) for rows in (2, 2, 1, 2, 2, 1)]


def test_a_frozen_vision_transformer_runs_once_an_image(tokenizer):
    for freeze, passes in ((True, 1), (False, 2)):
        model = build(tokenizer, freeze_vit=freeze)
        seen, vit_tokens = [], model.vit_tokens

        def watched(images, seen=seen, vit_tokens=vit_tokens):
            seen.append(len(images) if images.dim() == 4 else 0)  # what is not tokens yet
            return vit_tokens(images)

        model.vit_tokens = watched
        cached(model, batch(model), 2)
        assert sum(seen) == passes * 2 * len(TEXTS)
        samples = model.read_images(batch(model))
        assert samples["image"].dim() == (3 if freeze else 4)
        assert model.read_images(samples) is samples  # so tokens from a feature cache are not copied


def test_diagnostics_and_the_log_are_means_over_the_batch(tokenizer, tmp_path):
    model = build(tokenizer, dropout=0.0, fusion_dropout=0.0)
    samples = batch(model)
    found = {}
    for way, step in (("plain", lambda: model(samples)), ("cached", lambda: None)):
        (tmp_path / way).mkdir()
        log = FusionLog(model.gated_fusion, tmp_path / way, every=1)
        if way == "plain":
            sum(step().values()).backward()
        else:
            cache = GradCache(model, Embedder(model), 2, full_precision)
            sum(cache.losses(samples).values()).backward()
        found[way] = {name: value.item() for name, value in model.diagnostics.items()}
        if way == "cached":
            cache.backward()
        log.after_backward()
        model.zero_grad()
        model.gated_fusion._forward_hooks.clear()
    assert list(found["cached"]) == ["gate_mean", "gate_std", "alpha", "mean_change"]
    (plain,), (chunks,) = (read_csv(tmp_path / way / "fusion_metrics.csv") for way in found)
    logged = [{name: float(value) for name, value in row.items()} for row in (plain, chunks)]
    for theirs, mine in ((found["plain"], found["cached"]), logged):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            # A chunk's spread leaves out how far the chunks' means are apart.
            assert mine[name] == pytest.approx(value, rel=0.05 if name == "gate_std" else 1e-4), name
