"""Encoding a split: every image once, each query as `inference` would compose it."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.small_models import random_images, randomise, small_config
from helpers.small_split import NAMES, REFERENCES, TRIPLETS

from sprc.data.split import Split
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.scoring.encoding import encode_split


@pytest.mark.parametrize("gallery_dtype", ["float32", "float16"])
@pytest.mark.parametrize("fusion", [True, False])
def test_a_split_is_encoded_once_an_image_and_as_inference_does(tokenizer, fusion, gallery_dtype):
    model = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=fusion), tokenizer)
    randomise(model)
    pixels = dict(zip(NAMES, random_images(len(NAMES), model.config), strict=True))
    loads = Counter()

    def load(path):
        loads[path.name] += 1
        return pixels[path.name]

    split = Split("val", TRIPLETS, {name: Path("folder") / name for name in NAMES})
    encoded = encode_split(model, split, load, batch_size=3, num_workers=0, gallery_dtype=gallery_dtype)
    assert model.training
    assert loads == dict.fromkeys(NAMES, 1)

    model.eval()
    target_feats, image_embeds = model.extract_target_features(torch.stack(list(pixels.values())))
    assert encoded.gallery.dtype == getattr(torch, gallery_dtype)
    torch.testing.assert_close(encoded.gallery.float(), target_feats, rtol=1e-3, atol=1e-3)
    if gallery_dtype == "float32":
        torch.testing.assert_close(encoded.gallery, target_feats, rtol=1e-5, atol=1e-6)
    # Against unit axes, similarities are the entries of the query itself.
    axes = torch.eye(model.config.embed_dim)[:, None, :]
    for number, reference in enumerate(REFERENCES):
        f = model.inference(image_embeds[reference][None], axes, [TRIPLETS[number].caption])[0]
        torch.testing.assert_close(encoded.composed[number], f, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            p = model.text_features(model.tokenize([TRIPLETS[number].caption]))[0]
        torch.testing.assert_close(encoded.text_only[number], p, rtol=1e-5, atol=1e-6)
    assert encoded.references.tolist() == REFERENCES
    assert encoded.targets.tolist() == [6] * len(REFERENCES)
    assert encoded.members.tolist() == [[reference, 6, 2] for reference in REFERENCES]


def test_a_caller_can_end_it_after_any_batch(tokenizer):
    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)
    pixels = dict(zip(NAMES, random_images(len(NAMES), model.config), strict=True))
    split = Split("val", TRIPLETS, {name: Path("folder") / name for name in NAMES})

    def seen_at_batches(stop_at):
        read, seen = [], []

        def load(path):
            read.append(path.name)
            return pixels[path.name]

        def on_batch():
            seen.append(len(read))
            if len(seen) == stop_at:
                raise KeyError("stop")

        with suppress(KeyError):
            encode_split(model, split, load, batch_size=3, num_workers=0, on_batch=on_batch)
        return seen

    assert seen_at_batches(None) == [3, 6, 7]
    assert seen_at_batches(2) == [3, 6]


def test_a_model_in_training_goes_on_training_whatever_its_validation_meets(tokenizer):
    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)

    def load(path):
        raise OSError("the disk is gone")

    split = Split("val", TRIPLETS, {name: Path("folder") / name for name in NAMES})
    with pytest.raises(OSError, match="the disk is gone"):
        encode_split(model, split, load, batch_size=3, num_workers=0)
    assert model.training
