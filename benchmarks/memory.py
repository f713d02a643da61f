"""Which batch fits into which GPU: the peak memory of a training step, estimated without a GPU.

    python benchmarks/memory.py
runs a step of the trainer's own model, losses and optimizer on fake tensors, which have a shape, a type
and no memory, and adds up what lives at once: weights, gradients, AdamW's two moments, what the backward
pass keeps. Mixed precision is that of a GPU: products in bfloat16, LayerNorm in float32, attention that
keeps no weights, a frozen vision transformer in float16. Not in it: CUDA's own context, work space and
fragments. Say a GB, and a tenth.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import torch.nn.functional as F
from steps import make_captions
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sprc.config import ModelConfig, read_backbone
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Text
from sprc.models.blip2_qformer_cir_rerank import Beside, Blip2QformerCirRerank
from sprc.models.qformer import Layout
from sprc.self_check.setting import made_tokenizer
from sprc.self_check.speed import take_step
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.loop import make_optimizer

BATCHES = (64, 128, 256)
NEGATIVES = (4, 8, 16)  # a query's, of a re-ranker
BLOCK = 512  # CUDA's allocator gives multiples of it


class Peak(TorchDispatchMode):
    """Adds up the storages that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and look at what it makes."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """What is called when a storage is freed."""
        self.known.discard(key)
        self.now -= size


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """CPU autocast with CUDA's rules where they change what is kept."""
    attention, layer_norm = F.scaled_dot_product_attention, F.layer_norm

    def without_weights(*tensors: Tensor, dropout_p: float = 0.0, **rest: Any) -> Tensor:
        return attention(*tensors, **rest)  # a GPU's kernels keep a seed for the dropout

    def in_float32(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *rest, **options)

    with (
        patch.object(F, "scaled_dot_product_attention", without_weights),
        patch.object(F, "layer_norm", in_float32),
        patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor),  # it looks at what it drew
    ):
        yield


def make_model(config: ModelConfig) -> Blip2QformerCirAlignPrompt:
    """The model on fake tensors, its frozen vision transformer as a GPU keeps it."""
    model = Blip2QformerCirAlignPrompt(config, made_tokenizer(config.vocab_size)).train()
    for module in model.visual_encoder.modules():  # halve_frozen_vit's way does not go with fake tensors
        if isinstance(module, nn.Linear | nn.Conv2d):
            for name, weights in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(weights.half(), requires_grad=False))

    def tokenize(texts: list[str]) -> Text:
        with unset_fake_temporarily():  # fake tensors would not tell where words are
            padding = model.tokenizer.pad_token_id
            rows = [torch.tensor(model.caption_ids[text]) for text in texts]
            ids = pad_sequence(rows, batch_first=True, padding_value=padding)
            text = model.lay_out(torch.zeros(*ids.shape, 1), ids != padding)
        return text._replace(words=model.Qformer.bert.embeddings.word_embeddings(ids))

    def vit_tokens(image: Tensor) -> Tensor:
        if image.dim() == 3:
            return image
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            return model.visual_encoder(image)

    model.tokenize, model.vit_tokens = tokenize, vit_tokens
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, chunk: int, *, cached: bool) -> None:
    """As ``Trainer.train_epoch`` makes it, in bfloat16."""
    config = model.config
    size = config.image_size
    shape = (config.num_patches**2 + 1, config.vit_width) if cached else (3, size, size)
    dtype = torch.bfloat16 if cached else torch.float32  # of the size of float16, in which they are kept
    image, target = (torch.empty(batch, *shape, dtype=dtype) for _ in range(2))
    samples = {"image": image, "target": target, "text_input": make_captions(batch)}
    mixed_precision = partial(torch.autocast, "cpu", torch.bfloat16)
    cache = GradCache(model, Embedder(model), chunk, mixed_precision) if chunk else None
    take_step(model, optimizer, samples, cache, mixed_precision)


def stepped_once(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with AdamW's moments there and no gradient."""
    optimizer = make_optimizer(model, 1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def peak_of(config: ModelConfig, batch: int, chunk: int, *, cached: bool) -> float:
    """The most GB that live at once in a step, AdamW's moments being there."""
    peak = Peak()
    with as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), peak:
        model = make_model(config)
        if cached:
            model.visual_encoder = nn.Identity()  # it waits on the CPU
        optimizer = stepped_once(model)
        peak.most = peak.now
        step(model, optimizer, batch, chunk, cached=cached)
    return peak.most / 1e9


def make_reranker(config: ModelConfig) -> Blip2QformerCirRerank:
    """The re-ranker on fake tensors; its vision transformer waits on the CPU."""
    model = Blip2QformerCirRerank(config, made_tokenizer(config.vocab_size)).train()
    model.visual_encoder = nn.Identity()

    def beside(prompts: Tensor, captions: list[str]) -> Beside:
        with unset_fake_temporarily():  # fake tensors would not tell where words are
            ids, mask = model.pad([model.caption_ids[caption] for caption in captions])
            seen = torch.cat([mask.new_ones(len(mask), config.num_query_tokens), mask], dim=1)
            layout = Layout.of(seen, config.num_query_tokens, cls_first=False, words=torch.zeros(1))
        embed = model.Qformer.bert.embeddings
        words = embed(embed.word_embeddings(ids), 0)
        return Beside(torch.cat([embed(prompts.to(words.dtype)), words], dim=1), layout)

    model.beside, model.vit_tokens = beside, lambda image: image
    return model


def peak_of_reranker(config: ModelConfig, batch: int, negatives: int, chunk: int) -> float:
    """The most GB that live at once in a re-ranker's step from cached tokens, in bfloat16."""
    peak = Peak()
    mixed_precision = partial(torch.autocast, "cpu", torch.bfloat16)
    with as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), peak:
        model = make_reranker(config)
        optimizer = stepped_once(model)
        peak.most = peak.now
        tokens = (config.num_patches**2 + 1, config.vit_width)
        samples = {
            "prompts": torch.empty(batch, config.num_query_tokens, config.hidden_size, dtype=torch.bfloat16),
            "candidates": torch.empty(batch, 1 + negatives, *tokens, dtype=torch.bfloat16),
            "text_input": make_captions(batch),
        }
        cache = GradCache(model, Embedder(model), chunk, mixed_precision) if chunk else None
        take_step(model, optimizer, samples, cache, mixed_precision)
    return peak.most / 1e9


def print_rerankers() -> None:
    """Print the re-ranker's table."""
    print("\n| backbone | batch | --grad-cache |", *(f"{count} negatives |" for count in NEGATIVES))
    print("|---|---|---|" + "---|" * len(NEGATIVES))
    for backbone in ("pretrain", "pretrain_vitL"):
        config = ModelConfig(**{**read_backbone(backbone)["model"], "use_gated_fusion": False})
        for batch, chunk in ((16, 0), (16, 8), (16, 4), (64, 0), (64, 8)):
            figures = [f"{peak_of_reranker(config, batch, count, chunk):.1f}" for count in NEGATIVES]
            told = [backbone, str(batch), str(chunk or "none"), *figures]
            print(f"| {' | '.join(told)} |", flush=True)


def main() -> None:
    """Print the tables: of SPRC's step, and of a re-ranker's."""
    print("| backbone | images | fusion | --grad-cache |", *(f"batch {batch} |" for batch in BATCHES))
    print("|---|---|---|---|" + "---|" * len(BATCHES))
    plain, chunks = [(True, 0), (False, 0)], [(True, 32), (True, 16)]
    for backbone, cached, cases in (
        ("pretrain", False, plain + chunks),
        ("pretrain", True, plain + chunks),
        ("pretrain_vitL", False, plain + chunks[1:]),
        ("pretrain_vitL", True, plain[:1]),
    ):
        for fusion, chunk in cases:
            config = ModelConfig(**{**read_backbone(backbone)["model"], "use_gated_fusion": fusion})
            figures = [f"{peak_of(config, batch, chunk, cached=cached):.1f}" for batch in BATCHES]
            what = "from the cache" if cached else "from pixels"
            told = [backbone, what, "on" if fusion else "off", str(chunk or "none"), *figures]
            print(f"| {' | '.join(told)} |", flush=True)
    print_rerankers()


if __name__ == "__main__":
    main()
