"""The calls that SPRC's own scripts make, and no other, after the one import line of docs/checkpoints.md.

    python sprc_calls.py WORK CHECKPOINT SWITCHES ...

WORK is train (as blip_fine_tune_2.py) or score (as blip_validate.py, validate_blip.py and
cirr_test_submission.py); SWITCHES is what SPRC_SWITCHES names. More such threes may follow; each prints the
distances that it ends with, or the error. A class is registered first, as in an SPRC checkout. The pixels are
those of their TargetPad at 224 (sprc_pixels.py). It runs in SPRC's own environment too (Python 3.9, torch
2.0), so it imports nothing else of the tests'.
"""

import json
import os
import sys
import warnings
from operator import itemgetter
from pathlib import Path

import torch
from lavis.common.registry import registry
from lavis.models import BaseModel, load_model_and_preprocess
from sprc_pixels import CAPTIONS, pixels
from torch import optim
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore", category=FutureWarning)  # torch.cuda.amp's names
warnings.filterwarnings("ignore", message=".*CUDA is not available")


@registry.register_model("blip2_cir_align_prompt")
class Theirs(BaseModel):
    """SPRC's class in its vendored LAVIS."""


import sprc.lavis_registration  # noqa: E402, F401
from sprc.errors import InputError  # noqa: E402

device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def scores(model, txt_processors):
    """Validation's and submission's calls, the last batch of one query: (queries, gallery)."""
    gallery = [(f"image {number}", pixels(number)) for number in range(6)]
    found = {"features": [], "raw": [], "names": []}
    for names, images in DataLoader(gallery, batch_size=4):
        with torch.no_grad():
            features, raw = model.extract_target_features(images.to(device, non_blocking=True), mode="mean")
        for key, value in zip(found, (features, raw, names)):
            found[key].append(value) if torch.is_tensor(value) else found[key].extend(value)
    features, raw = torch.vstack(found["features"]), torch.vstack(found["raw"])
    by_name = dict(zip(found["names"], raw))
    rows = []
    queries = [(f"image {number}", text) for number, text in enumerate(CAPTIONS)]
    for names, texts in DataLoader(queries, batch_size=2):
        captions = [txt_processors["eval"](text) for text in texts]
        with torch.no_grad():
            if len(captions) == 1:
                reference = itemgetter(*names)(by_name).unsqueeze(0)
            else:
                reference = torch.stack(itemgetter(*names)(by_name))
            rows.append(model.inference(reference, features, captions))
    distances = 1 - torch.vstack(rows)
    assert torch.argsort(distances, dim=-1).cpu().shape == (len(CAPTIONS), len(gallery))
    return distances


def train(model, txt_processors):
    """Two steps: the loss, its scaling, the schedule. The last batch holds one triplet."""
    update_method = getattr(model, "_update_f_former", None)
    assert not callable(update_method)
    optimizer = optim.AdamW(
        [
            {
                "params": filter(lambda p: p.requires_grad, model.parameters()),
                "lr": 1e-4,
                "betas": (0.9, 0.98),
                "eps": 1e-7,
                "weight_decay": 0.05,
            }
        ]
    )
    scheduler = optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-4, pct_start=1 / 50, steps_per_epoch=2, epochs=80
    )
    scaler = torch.cuda.amp.GradScaler()
    triplets = [(pixels(number), pixels(number + 1), CAPTIONS[number]) for number in range(4)]
    for images, targets, texts in DataLoader(triplets, batch_size=3, shuffle=True):
        optimizer.zero_grad()
        captions = [txt_processors["eval"](text) for text in texts]
        model.train()
        with torch.cuda.amp.autocast():
            losses = model({"image": images.to(device), "target": targets.to(device), "text_input": captions})
            loss = 0.0
            for key in losses.keys():  # noqa: SIM118
                loss += losses[key] if key == "loss_itc" else 0.4 * losses[key]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert all(losses[key].to("cpu", non_blocking=True).detach().isfinite() for key in losses)
    model.eval()


def main(work, path):
    torch.manual_seed(len(work))  # not the same start: what a file lacks would be other numbers
    model, _, txt_processors = load_model_and_preprocess(
        name="blip2_cir_align_prompt", model_type="tiny", is_eval=False, device=device
    )
    if work == "train":
        train(model, txt_processors)
        distances = scores(model, txt_processors)
        torch.save({"epoch": 0, model.__class__.__name__: model.state_dict()}, str(path))
    else:
        checkpoint = torch.load(path, map_location=device)
        message = model.load_state_dict(checkpoint[model.__class__.__name__], strict=False)
        print(f"Missing keys {message.missing_keys}")
        model.eval()
        distances = scores(model, txt_processors)
    print("distances", json.dumps(distances.double().tolist()))


if __name__ == "__main__":
    for work, file, switches in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
        os.environ["SPRC_SWITCHES"] = switches
        try:
            main(work, Path(file))
        except InputError as error:
            print(f"refused {error}")
