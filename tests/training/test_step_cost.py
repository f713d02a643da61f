"""What a training step does once: read a caption, cast the image's tokens, build one graph."""

from types import SimpleNamespace

import pytest
import torch
from helpers.small_models import CAPTIONS, TOO_LONG, random_images, small_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from sprc.data.captions import process_caption
from sprc.models import vision_groups
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Text
from sprc.models.tokenizer import CaptionIds
from sprc.training import loop as training
from sprc.training.fusion_log import FusionLog
from sprc.training.loop import Trainer, TrainingConfig


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


# The reference's and the target's for the Q-Former; the gate reads the reference before its edit. `cross` has
# three layers that do, and the layers of `select` read the tokens that it has chosen.
@pytest.mark.parametrize(
    ("changes", "casts"),
    [
        ({}, 3),
        ({"use_gated_fusion": False}, 2),
        ({"fusion_strategy": "cross"}, 3),
        ({"fusion_strategy": "select"}, 2),
    ],
    ids=str,
)
def test_image_tokens_are_cast_once_for_all_layers(tokenizer, changes, casts) -> None:
    model = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)
    tokens = model.vit_tokens(random_images(2 * len(CAPTIONS), model.config))
    text = model.tokenize(CAPTIONS)
    counted = Casts((len(CAPTIONS), *tokens.shape[1:]))
    with torch.autocast("cpu", torch.bfloat16), counted:
        model.embed_tokens(tokens, text)
    assert counted.count == casts


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_gated_fusion": False}, {"fusion_strategy": "cross"}, {"fusion_strategy": "select"}],
    ids=str,
)
def test_compiling_gives_one_graph(tokenizer, tmp_path, changes) -> None:
    model = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer)
    if model.gated_fusion is not None:
        # Of a step that is not due.
        FusionLog(model.gated_fusion, tmp_path, every=2, step=1, compiled=True)
    compiled = torch.compile(model.embed_tokens, dynamic=True, backend="eager", fullgraph=True)
    tokens = model.vit_tokens(random_images(2 * len(CAPTIONS), model.config))
    compiled(tokens, model.tokenize(CAPTIONS))  # a break in the graph would raise


def test_a_caption_is_tokenized_once_and_as_the_tokenizer_does(tokenizer) -> None:
    calls = []

    class Counting:
        pad_token_id = tokenizer.pad_token_id

        def encode(self, text: str, most: int) -> list[int]:
            calls.append(text)
            return tokenizer.encode(text, most)

    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)
    model.caption_ids = CaptionIds(Counting(), model.config.max_txt_len)
    captions = [*CAPTIONS, TOO_LONG, "", " "]
    rows = [torch.tensor(tokenizer.encode(caption, model.config.max_txt_len)) for caption in captions]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    words: Tensor = model.Qformer.bert.embeddings.word_embeddings(ids)
    for _ in range(2):
        text = model.tokenize(captions)
        assert torch.equal(text.words, words)
        assert torch.equal(text.mask, ids != tokenizer.pad_token_id)
    assert calls == [process_caption(caption) for caption in captions]


def test_the_captions_that_are_kept_are_limited(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(CaptionIds, "MOST", 2)
    ids = CaptionIds(tokenizer, 9)
    for caption in CAPTIONS:
        assert ids[caption] == tokenizer.encode(caption, 9)
    assert len(ids) == 2


class NoData(Dataset):
    """A data set's length; its batches are given to the loop as they are."""

    def __len__(self) -> int:
        return 2 * len(CAPTIONS)

    def set_epoch(self, epoch: int) -> None:
        """There are no captions to draw."""


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("grad_cache", [None, 2])
def test_a_step_waits_once_for_what_the_device_computed(tokenizer, tmp_path, monkeypatch, amp, grad_cache):
    """On fake tensors, which have no values: whatever else would ask for one raises an error."""
    waits = []

    def of_all_ranks(values: Tensor) -> object:
        waits.append(values)
        return SimpleNamespace(tolist=lambda: [[0.0] * len(values)])

    monkeypatch.setattr(training, "of_all_ranks", of_all_ranks)
    monkeypatch.setattr(vision_groups, "place_matters", lambda *_: False)  # tried once, on the CPU
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # looks at what it drew
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)

        def tokenize(captions: list[str]) -> Text:
            with unset_fake_temporarily():  # what the CPU knows
                mask = torch.ones(len(captions), 5, dtype=torch.bool)
                text = model.lay_out(torch.zeros(*mask.shape, 1), mask)
            words = model.Qformer.bert.embeddings.word_embeddings(torch.zeros(mask.shape, dtype=torch.int64))
            return text._replace(words=words)

        monkeypatch.setattr(model, "tokenize", tokenize)
        config = TrainingConfig(
            batch_size=len(CAPTIONS), num_epochs=1, num_workers=0, amp=amp, grad_cache=grad_cache
        )
        trainer = Trainer(model, NoData(), config, tmp_path)
        images = torch.empty(len(CAPTIONS), 3, model.config.image_size, model.config.image_size)
        trainer.loader = 2 * [{"image": images, "target": images, "text_input": CAPTIONS}]
        trainer.train_epoch()
    assert len(waits) == 2
