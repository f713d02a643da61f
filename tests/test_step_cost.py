"""What a training step does once: read a caption, cast the image's tokens, build one graph."""

import pytest
import torch
from conftest import CAPTIONS, TOO_LONG, random_images, small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.tokenizer import CaptionIds

ON_AND_OFF = pytest.mark.parametrize("fusion", [True, False], ids=["on", "off"])


class Casts(TorchDispatchMode):
    """Counts the copies of tensors of ``shape`` in another type."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.shape == self.shape:
            self.count += found.dtype is torch.bfloat16
        return found


@ON_AND_OFF
def test_image_tokens_are_cast_once_for_all_layers(tokenizer, fusion) -> None:
    model = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=fusion), tokenizer)
    tokens = model.vit_tokens(random_images(2 * len(CAPTIONS), model.config))
    text = model.tokenize(CAPTIONS)
    casts = Casts((len(CAPTIONS), *tokens.shape[1:]))
    with torch.autocast("cpu", torch.bfloat16), casts:
        model.embed_tokens(tokens, text)
    # The reference's and the target's for the Q-Former; the gate reads the reference before its edit.
    assert casts.count == (3 if fusion else 2)


@ON_AND_OFF
def test_compiling_gives_one_graph(tokenizer, fusion) -> None:
    model = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=fusion), tokenizer)
    compiled = torch.compile(model.embed_tokens, dynamic=True, backend="eager", fullgraph=True)
    tokens = model.vit_tokens(random_images(2 * len(CAPTIONS), model.config))
    compiled(tokens, model.tokenize(CAPTIONS))  # a break in the graph would raise


def test_a_caption_is_tokenized_once_and_as_the_tokenizer_does(tokenizer) -> None:
    calls = []

    class Counting:
        pad_token_id = tokenizer.pad_token_id

        def __call__(self, text: str, **options: object) -> object:
            calls.append(text)
            return tokenizer(text, **options)

    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)
    model.caption_ids = CaptionIds(Counting(), model.config.max_txt_len)
    captions = [*CAPTIONS, TOO_LONG, "", " "]
    expected = tokenizer(
        captions,
        padding="longest",
        truncation=True,
        max_length=model.config.max_txt_len,
        return_tensors="pt",
    )
    words: Tensor = model.Qformer.bert.embeddings.word_embeddings(expected.input_ids)
    for _ in range(2):
        text = model.tokenize(captions)
        assert torch.equal(text.words, words)
        assert torch.equal(text.mask, expected.attention_mask.bool())
    assert calls == captions


def test_the_captions_that_are_kept_are_limited(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(CaptionIds, "MOST", 2)
    ids = CaptionIds(tokenizer, 9)
    for caption in CAPTIONS:
        assert ids[caption] == tokenizer(caption, truncation=True, max_length=9).input_ids
    assert len(ids) == 2
