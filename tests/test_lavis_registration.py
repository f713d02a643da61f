"""LAVIS users get the model through LAVIS's own door, ready to train."""

import pytest
import torch
from PIL import Image

from sprc.config import BACKBONES

pytest.importorskip("lavis", reason="LAVIS is not installed")


@pytest.fixture(scope="module")
def loaded():
    from lavis.models import load_model_and_preprocess

    import sprc.lavis_registration  # noqa: F401

    torch.manual_seed(0)
    return load_model_and_preprocess("blip2_cir_align_prompt", "tiny", is_eval=False, device="cpu")


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
