"""The peak memory of a training step, without its device: a step on fake tensors, and what lives at once.

Fake tensors have a shape, a type and no memory. On them runs a step of the trainer's own model, losses and
optimizer, and the storages that live at once are added up: weights, gradients, AdamW's two moments, what the
backward pass keeps. By a GPU's rules it is mixed precision: products in bfloat16, LayerNorm in float32,
attention that keeps no weights, a frozen vision transformer in float16. By a CPU's it is float32 and all as
it is. Not in it: what libraries take (CUDA's context, work space, fragments).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from steps import Samples, make_captions
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sprc.config import ModelConfig
from sprc.models import vision_groups
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Text
from sprc.models.blip2_qformer_cir_rerank import Beside, Blip2QformerCirRerank
from sprc.models.qformer import Layout
from sprc.self_check.setting import made_tokenizer
from sprc.self_check.speed import take_step
from sprc.training.grad_cache import Embedder, GradCache
from sprc.training.loop import make_optimizer

BLOCK = 512  # CUDA's allocator gives multiples of it


class Use(NamedTuple):
    """Memory of a step, in bytes."""

    before: int  # weights, AdamW's moments and the batch
    most: int  # these included


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
def rules_of(device: str) -> Iterator[None]:
    """Fake tensors, which are a CPU's, as on ``device``; CPU autocast with CUDA's rules for what is kept."""
    attention, layer_norm = F.scaled_dot_product_attention, F.layer_norm

    def without_weights(*tensors: Tensor, dropout_p: float = 0.0, **rest: Any) -> Tensor:
        return attention(*tensors, **rest)  # a GPU's kernels keep a seed for the dropout

    def in_float32(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *rest, **options)

    on_gpu = device == "cuda"
    with (
        patch.object(F, "scaled_dot_product_attention", without_weights if on_gpu else attention),
        patch.object(F, "layer_norm", in_float32 if on_gpu else layer_norm),
        # These look at what they drew or computed.
        patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor),
        patch.object(vision_groups, "place_matters", lambda *_: False),
    ):
        yield


def mixed_precision_of(device: str) -> Callable[[], AbstractContextManager]:
    """What ``--amp auto`` takes, on fake tensors."""
    return partial(torch.autocast, "cpu", torch.bfloat16) if device == "cuda" else nullcontext


def make_model(config: ModelConfig, device: str, *, cached: bool) -> Blip2QformerCirAlignPrompt:
    """The model on fake tensors; from cached tokens without a vision transformer, which waits elsewhere."""
    model = Blip2QformerCirAlignPrompt(config, made_tokenizer(config.vocab_size)).train()
    own_tokens = model.vit_tokens

    def tokenize(texts: list[str]) -> Text:
        with unset_fake_temporarily():  # fake tensors would not tell where words are
            ids, mask = model.pad([model.caption_ids[text] for text in texts])
            text = model.lay_out(torch.zeros(*ids.shape, 1), mask)
        return text._replace(words=model.Qformer.bert.embeddings.word_embeddings(ids))

    def vit_tokens(image: Tensor) -> Tensor:
        if image.dim() == 3 or device == "cpu":
            return own_tokens(image)
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            return model.visual_encoder(image)

    model.tokenize, model.vit_tokens = tokenize, vit_tokens
    if cached:
        model.visual_encoder = nn.Identity()
    elif device == "cuda":
        for module in model.visual_encoder.modules():  # halve_frozen_vit's way does not go with fake tensors
            if isinstance(module, nn.Linear | nn.Conv2d):
                for name, weights in list(module.named_parameters()):
                    setattr(module, name, nn.Parameter(weights.half(), requires_grad=False))
    return model


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


def stepped_once(model: nn.Module) -> Optimizer:
    """The optimizer, with AdamW's moments there and no gradient."""
    optimizer = make_optimizer(model, 1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def captions_of(batch: int, chunk: int) -> list[str]:
    """Captions of CIRR's lengths; all chunks of --grad-cache get the same, so that memory grows evenly."""
    return (make_captions(chunk or batch) * -(-batch // (chunk or batch)))[:batch]


def half_of(device: str) -> torch.dtype:
    """A cache's type; CPU autocast joins its own half precision with no other."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def make_samples(config: ModelConfig, batch: int, chunk: int, device: str, *, cached: bool) -> Samples:
    """A batch for SPRC's step, as the data loader gives it."""
    size = config.image_size
    shape = (config.num_patches**2 + 1, config.vit_width) if cached else (3, size, size)
    dtype = half_of(device) if cached else torch.float32
    image, target = (torch.empty(batch, *shape, dtype=dtype) for _ in range(2))
    return {"image": image, "target": target, "text_input": captions_of(batch, chunk)}


def make_queries(config: ModelConfig, batch: int, chunk: int, device: str, negatives: int) -> Samples:
    """A batch for a re-ranker's step, from cached tokens."""
    tokens = (config.num_patches**2 + 1, config.vit_width)
    prompts = (config.num_query_tokens, config.hidden_size)
    return {
        "prompts": torch.empty(batch, *prompts, dtype=half_of(device)),
        "candidates": torch.empty(batch, 1 + negatives, *tokens, dtype=half_of(device)),
        "text_input": captions_of(batch, chunk),
    }


def use_of_steps(
    config: ModelConfig,
    batches: Iterable[int],
    chunk: int,
    device: str = "cuda",
    *,
    cached: bool,
    negatives: int = 0,
) -> dict[int, Use]:
    """The memory of a step at each batch size, AdamW's moments being there.

    Args:
        config: the model's.
        batches: triplets a step, or a re-ranker's queries.
        chunk: of ``--grad-cache``; 0 without it.
        device: by whose rules, "cpu" or "cuda".
        cached: from a feature cache's tokens; else from pixels.
        negatives: of each of a re-ranker's queries, which reads cached tokens; 0 for SPRC's own step.
    """
    mixed_precision = mixed_precision_of(device)
    peak, found = Peak(), {}
    with rules_of(device), FakeTensorMode(allow_non_fake_inputs=True), peak:
        model = make_reranker(config) if negatives else make_model(config, device, cached=cached)
        optimizer = stepped_once(model)
        for batch in batches:
            if negatives:
                samples = make_queries(config, batch, chunk, device, negatives)
            else:
                samples = make_samples(config, batch, chunk, device, cached=cached)
            before = peak.most = peak.now
            cache = GradCache(model, Embedder(model), chunk, mixed_precision) if chunk else None
            take_step(model, optimizer, samples, cache, mixed_precision)
            found[batch] = Use(before, peak.most)
            optimizer.zero_grad(set_to_none=True)
            del samples, cache
    return found
