"""The calls that SPRC's own scripts make, and no other, after the one import line of GATED_FUSION.md.

Run as: python sprc_calls.py CHECKPOINT. A class is registered first, as in an SPRC checkout.
"""

import sys

import torch
from lavis.common.registry import registry
from lavis.models import BaseModel, load_model_and_preprocess


@registry.register_model("blip2_cir_align_prompt")
class Theirs(BaseModel):
    """SPRC's class in its vendored LAVIS."""


import sprc.lavis_registration  # noqa: E402, F401

torch.manual_seed(0)
device = torch.device("cpu")
model, vis_processors, txt_processors = load_model_and_preprocess(
    name="blip2_cir_align_prompt", model_type="tiny", is_eval=False, device=device
)
captions = [
    txt_processors["eval"](text) for text in ("Make the circle blue.", "Remove the star!", "add a cross")
]
images = torch.randn(2, 3, 3, 96, 96)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
scaler = torch.amp.GradScaler("cpu", enabled=False)
model.train()
with torch.autocast("cpu", enabled=False):
    losses = model({"image": images[0], "target": images[1], "text_input": captions})
    loss = losses["loss_itc"] + 0.4 * losses["loss_rtc"] + 0.4 * losses["loss_align"]
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()

model.eval()
with torch.no_grad():
    features = model.extract_target_features(images[1].to(model.device), mode="mean")
    reference_embeds = model.extract_target_features(images[0], mode="mean")[1]
    similarities = model.inference(reference_embeds, features[0], captions)
    one = model.inference(reference_embeds[:1], features[0], captions[:1])
assert similarities.shape == (3, 3)
assert torch.allclose(one[0], similarities[0], atol=1e-5)
torch.save({"epoch": 0, model.__class__.__name__: model.state_dict()}, sys.argv[1])
