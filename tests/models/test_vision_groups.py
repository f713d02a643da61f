"""A frozen vision transformer on a CPU: an image's tokens do not depend on its company."""

import pytest
import torch
from helpers.small_models import build_vit, random_images, randomise, small_config

from sprc.config import ModelConfig, read_backbone
from sprc.models import vision_groups
from sprc.models.vision_groups import group_size, steady_tokens

TINY = ModelConfig(**read_backbone("tiny")["model"])
CONFIGS = {"tiny": TINY, "small": small_config(), "CLIP": small_config(vit="clip")}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def build(config, dtype=torch.float32):
    vit = build_vit(config).eval()
    randomise(vit)
    return vit.to(dtype)


@pytest.mark.numeric
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CONFIGS), ("small", torch.float64)]
)
def test_tokens_are_the_same_to_the_bit_alone_and_in_any_company_and_place(name, dtype, threads):
    config = CONFIGS[name]
    vit, images = build(config, dtype), random_images(67, config).to(dtype)
    alone = torch.cat([steady_tokens(vit, image) for image in images.split(1)])
    torch.testing.assert_close(alone, vit(images), rtol=1e-3, atol=1e-3)
    for batch in (7, 32, 67):
        for order in (torch.arange(67), torch.randperm(67)):
            tokens = torch.cat([steady_tokens(vit, part) for part in images[order].split(batch)])
            assert torch.equal(tokens, alone[order]), batch
    assert torch.equal(steady_tokens(vit, images.contiguous(memory_format=torch.channels_last)), alone)
    assert steady_tokens(vit, images[:0]).shape == (0, *alone.shape[1:])


@torch.no_grad()
@pytest.mark.parametrize("what", ["the last image", "the last numbers"])
def test_where_the_place_matters_images_are_computed_one_by_one(what, monkeypatch):
    vit, images, whole, gelu = build(TINY), random_images(5, TINY), [], torch.nn.functional.gelu
    vit.register_forward_hook(lambda _, __, tokens: whole.append(len(tokens)))
    if what == "the last image":
        vit.register_forward_hook(
            lambda _, __, tokens: tokens * (1 + (torch.arange(len(tokens)) == 31)[:, None, None] * 2**-20)
        )
    else:
        monkeypatch.setattr(
            vision_groups.F, "gelu", lambda x: gelu(x) if x.numel() % 32 == 0 else gelu(x) * (1 + 2**-20)
        )
    alone = torch.cat([steady_tokens(vit, image) for image in images.split(1)])
    whole.clear()
    assert torch.equal(steady_tokens(vit, images), alone)
    assert whole == [1] * 5


@torch.no_grad()
def test_the_place_is_tried_once_for_a_model_a_type_and_a_number_of_threads(monkeypatch):
    tried = []
    monkeypatch.setattr(vision_groups, "place_matters", lambda *_: tried.append(torch.get_num_threads()))
    vit, images, before = build(TINY), random_images(3, TINY), torch.get_num_threads()
    try:
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            assert group_size(vit, images) == 32
            assert group_size(vit, images.double()) == 32
        assert tried == [1, 1, 2, 2]
        assert group_size(build(TINY), images) == 32
        assert len(tried) == 5
    finally:
        torch.set_num_threads(before)


def test_a_large_vision_transformer_takes_one_image_at_a_time_and_tries_nothing(monkeypatch):
    monkeypatch.setattr(vision_groups, "place_matters", lambda *_: pytest.fail("tried"))
    with torch.device("meta"):
        vit = build_vit(ModelConfig(vit_depth=1))  # ViT-g's widths
    assert group_size(vit, random_images(2, ModelConfig())) == 1
