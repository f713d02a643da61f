"""Small models, captions and images that several test files share."""

import errno
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plain_model import SPECIAL_TOKENS
from runner import run, train
from searching import make_index, save_model
from torch import Tensor, nn

from sprc.config import ModelConfig
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.qformer import Layout, QFormer
from sprc.models.tokenizer import tokenizer_from_vocabulary
from sprc.models.vision import ClipViT, EvaViT


def pytest_configure(config):
    """Hide the GPUs from all tests but those of them (-m gpu). torch looks when it first needs one.

    A shell's background job ignores Ctrl-C, and nohup's SIGHUP; what the tests start would do so as well.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # runner.py has set it

WORDS = "make the small red circle blue and remove square in top left add a green star"
VOCABULARY = [*SPECIAL_TOKENS, *WORDS.split()]

# Widths that differ from each other, so that a mix-up does not fit; epsilons large enough to be felt.
SMALL = {
    "image_size": 12,
    "patch_size": 4,
    "vit_width": 24,
    "vit_depth": 3,
    "vit_heads": 3,
    "vit_mlp_ratio": 2.3,
    "vit_norm_eps": 0.02,
    "vision_norm_eps": 0.05,
    "vocab_size": len(VOCABULARY) + 1,  # and [DEC]
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 40,
    "max_positions": 30,
    "norm_eps": 0.01,
    "num_query_tokens": 5,
    "embed_dim": 8,
    "max_txt_len": 9,
}

# A short one, one that fills max_txt_len with [CLS] and [SEP], and one in between.
CAPTIONS = ["remove the square", "make the small circle in the top", "add a green star"]
TOO_LONG = "make the small red circle blue and remove the green square in the top left"


def small_config(**changes: object) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def build_qformer(config: ModelConfig) -> QFormer:
    return QFormer(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        image_width=config.vit_width,
        cross_attention_every=config.cross_attention_every,
        max_positions=config.max_positions,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
    )


def call_bert(bert, ids=None, mask=None, queries=None, image=None, no_img=False, wanted=None):
    """One of the four calls on (B, M) ids and mask, (B, Q, C) queries, (B, N, D) image tokens.

    Returns (B, L, C) in the order of tests/plain_model.py, zeros where the text is padding.
    """
    num_queries = 0 if queries is None else queries.shape[1]
    if ids is None:
        layout = Layout(len(queries), num_queries)
        return layout.pad(bert(bert.embeddings(queries).flatten(0, 1), layout, image))
    words = bert.embeddings.word_embeddings(ids)
    if queries is None:
        queries = words[:, :0]
    if no_img:
        embedded = bert.embeddings(queries, 1), bert.embeddings(words, 0, num_queries + 1)
    else:
        embedded = bert.embeddings(queries), bert.embeddings(words, 0)
    layout = Layout.of(mask.bool(), num_queries, cls_first=image is None, words=words)
    if wanted is not None:
        return bert(layout.rows(*embedded), layout, image, wanted)
    padded = layout.pad(bert(layout.rows(*embedded), layout, image))
    if no_img:
        queries, text = padded[:, :num_queries], padded[:, num_queries:]
        padded = torch.cat([text[:, :1], queries, text[:, 1:]], dim=1)
    return padded


def seen(padded: Tensor, mask: Tensor) -> Tensor:
    """(B, L, C) with zeros where the (B, L) mask hides a token."""
    return padded * mask.unsqueeze(-1)


def build_vit(config: ModelConfig) -> EvaViT | ClipViT:
    return Blip2QformerCirAlignPrompt.vision_transformer(config)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter, norms, biases and padding included: no zero or one hides a bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 0:
                parameter.fill_({"temp": 0.3, "alpha": 0.8, "w_g": 1.3, "w_r": 0.7}[name.split(".")[-1]])
            elif parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 2 and "embedding" not in name:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
            elif parameter.dim() == 4:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(noise)


def random_images(count: int, config: ModelConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, config.image_size, config.image_size, generator=generator)


@pytest.fixture
def read_only(monkeypatch):
    """Call it with a folder: from then on it is as on a read-only disk, for root as well."""

    def lock(folder):
        def guard(name, writes):
            plain = getattr(Path, name)

            def guarded(self, *arguments, **named):
                if self.is_relative_to(folder) and writes(self, *arguments, **named):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
                return plain(self, *arguments, **named)

            monkeypatch.setattr(Path, name, guarded)

        guard("open", lambda path, mode="r", *_, **__: set(mode) & set("wax+"))
        guard("mkdir", lambda path, *_, **__: not path.exists())
        for name in ("unlink", "replace", "rename"):
            guard(name, lambda *_, **__: True)

    return lock


@pytest.fixture(scope="session")
def tokenizer():
    return tokenizer_from_vocabulary(VOCABULARY)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """72 training images with 144 triplets; 36 images and 36 triplets in val and in test1."""
    out = tmp_path_factory.mktemp("data")
    sizes = ("--train-families", 2, "--val-families", 1, "--test-families", 1, "--train-queries-per-set", 12)
    run("make_demo_data.py", "--out", out, *sizes)
    return out


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of two epochs with the published flags."""
    models = tmp_path_factory.mktemp("models")
    return train(
        data,
        models,
        *("--blip-model-name", "blip2_cir_align_prompt", "--num-epochs", 2, "--validation-frequency", 1),
        *("--loss-align", 0.4, "--loss-rtc", 0.4, "--target-ratio", 1.25, "--transform", "targetpad"),
        *("--save-training", "--save-best"),
    )


@pytest.fixture(scope="session")
def checkpoint(data, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model.pt", data, 0)


@pytest.fixture(scope="session")
def pictures(data, tmp_path_factory):
    """The 36 pictures of val, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, path in enumerate(sorted((data / "cirr_dataset/dev").iterdir())):
        (folder / "abc"[number % 3]).mkdir(exist_ok=True)
        shutil.copy(path, folder / "abc"[number % 3] / path.name)
    return folder


@pytest.fixture(scope="session")
def picture_index(pictures, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index"
    make_index(path, pictures, checkpoint)
    return path
