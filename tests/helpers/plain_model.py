"""The model once more, as plain functions over a state dict: what the tests hold the real one against.

Written from the paper's and the project's formulas, not from the project's code. Everything is the long
way round: one attention head at a time, masks as minus infinity, concatenated and expanded tensors. Only
for evaluation mode. Weights are ``{name: tensor}`` with the names of the checkpoint format; give them in
float64, and the result is exact as far as a float32 model is concerned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sprc.config import ModelConfig

Weights = dict[str, Tensor]

FUSION_NORM_EPS = 1e-5  # PyTorch's default
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def weights_of(module: torch.nn.Module) -> Weights:
    """The module's state dict in float64, floating point entries only."""
    return {name: value.double() for name, value in module.state_dict().items() if value.is_floating_point()}


def below(weights: Weights, prefix: str) -> Weights:
    """The entries whose names start with ``prefix.``, without it."""
    return {
        name[len(prefix) + 1 :]: value for name, value in weights.items() if name.startswith(prefix + ".")
    }


# --- building blocks


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, one head after the other.

    ``query`` (B, L, C), ``key`` and ``value`` (B, N, C), ``mask`` (B, N) with zeros at keys to leave out.
    """
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.einsum("blc,bnc->bln", query[..., part], key[..., part]) / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, -math.inf)
        outputs.append(torch.einsum("bln,bnc->blc", torch.softmax(scores, dim=-1), value[..., part]))
    return torch.cat(outputs, dim=-1)


# --- vision


def patches(image: Tensor, size: int) -> Tensor:
    """Cut (B, 3, S, S) into rows of pixels (B, (S / size) ** 2, 3 * size * size), row by row."""
    rows = []
    for top in range(0, image.shape[2], size):
        for left in range(0, image.shape[3], size):
            rows.append(image[:, :, top : top + size, left : left + size].flatten(1))
    return torch.stack(rows, dim=1)


def eva_vit(w: Weights, config: ModelConfig, image: Tensor) -> Tensor:
    """EVA-CLIP's ViT: biases on query and value only, no norm at the end. (B, 3, S, S) -> (B, N, D)."""
    kernel = w["patch_embed.proj.weight"]
    x = patches(image, config.patch_size) @ kernel.flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for i in range(config.vit_depth):
        block = below(w, f"blocks.{i}")
        normed = layer_norm(block, "norm1", x, config.vit_norm_eps)
        to_query, to_key, to_value = block["attn.qkv.weight"].chunk(3)
        attended = attend(
            normed @ to_query.T + block["attn.q_bias"],
            normed @ to_key.T,
            normed @ to_value.T + block["attn.v_bias"],
            config.vit_heads,
        )
        x = x + linear(block, "attn.proj", attended)
        normed = layer_norm(block, "norm2", x, config.vit_norm_eps)
        x = x + linear(block, "mlp.fc2", gelu(linear(block, "mlp.fc1", normed)))
    return x


def clip_vit(w: Weights, config: ModelConfig, image: Tensor) -> Tensor:
    """CLIP's ViT without its last norm and projection. (B, 3, S, S) -> (B, N, D)."""
    x = patches(image, config.patch_size) @ w["conv1.weight"].flatten(1).T
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["positional_embedding"]
    x = layer_norm(w, "ln_pre", x, config.vit_norm_eps)
    for i in range(config.vit_depth):
        block = below(w, f"transformer.resblocks.{i}")
        normed = layer_norm(block, "ln_1", x, config.vit_norm_eps)
        projections = zip(
            block["attn.in_proj_weight"].chunk(3), block["attn.in_proj_bias"].chunk(3), strict=True
        )
        query, key, value = (normed @ weight.T + bias for weight, bias in projections)
        x = x + linear(block, "attn.out_proj", attend(query, key, value, config.vit_heads))
        normed = layer_norm(block, "ln_2", x, config.vit_norm_eps)
        x = x + linear(block, "mlp.c_proj", quick_gelu(linear(block, "mlp.c_fc", normed)))
    return x


def image_tokens(w: Weights, config: ModelConfig, image: Tensor) -> Tensor:
    """The frozen ViT and the trained norm after it."""
    vit = {"eva": eva_vit, "clip": clip_vit}[config.vit]
    return layer_norm(w, "ln_vision", vit(below(w, "visual_encoder"), config, image), config.vision_norm_eps)


# --- text


def token_ids(captions: list[str], vocabulary: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, length) of captions that are made of whole words of the vocabulary."""
    ids = torch.full((len(captions), length), vocabulary.index("[PAD]"))
    for row, caption in enumerate(captions):
        words = caption.split()[: length - 2]
        for column, word in enumerate(["[CLS]", *words, "[SEP]"]):
            ids[row, column] = vocabulary.index(word)
    return ids, (ids != vocabulary.index("[PAD]")).long()


# --- the four Q-Former calls. `w` holds the names below `Qformer.bert`.


def embedding_norm(w: Weights, config: ModelConfig, x: Tensor) -> Tensor:
    return layer_norm(w, "embeddings.LayerNorm", x, config.norm_eps)


def words(w: Weights, ids: Tensor) -> Tensor:
    return w["embeddings.word_embeddings.weight"][ids]


def positions(w: Weights, count: int) -> Tensor:
    return w["embeddings.position_embeddings.weight"][:count]


def text_embeddings(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    """(B, M) -> (B, M, C): word and position, then the norm."""
    return embedding_norm(w, config, words(w, ids) + positions(w, ids.shape[1]))


def attention_block(
    w: Weights, name: str, x: Tensor, source: Tensor, config: ModelConfig, mask: Tensor | None = None
) -> Tensor:
    attended = attend(
        linear(w, f"{name}.self.query", x),
        linear(w, f"{name}.self.key", source),
        linear(w, f"{name}.self.value", source),
        config.num_heads,
        mask,
    )
    return layer_norm(
        w, f"{name}.output.LayerNorm", x + linear(w, f"{name}.output.dense", attended), config.norm_eps
    )


def feed_forward(w: Weights, kind: str, x: Tensor, config: ModelConfig) -> Tensor:
    """``kind`` is "" for text and "_query" for queries."""
    change = linear(w, f"output{kind}.dense", gelu(linear(w, f"intermediate{kind}.dense", x)))
    return layer_norm(w, f"output{kind}.LayerNorm", x + change, config.norm_eps)


def layers_with_image(
    w: Weights, config: ModelConfig, queries: Tensor, text: Tensor | None, image: Tensor, mask: Tensor | None
) -> Tensor:
    """Queries and text see each other; queries alone see the image, in layers 0, 2, ..."""
    count = queries.shape[1]
    x = queries if text is None else torch.cat([queries, text], dim=1)
    for i in range(config.num_layers):
        layer = below(w, f"encoder.layer.{i}")
        x = attention_block(layer, "attention", x, x, config, mask)
        queries, text = x[:, :count], x[:, count:]
        if i % config.cross_attention_every == 0:
            queries = attention_block(layer, "crossattention", queries, image, config)
        x = torch.cat(
            [feed_forward(layer, "_query", queries, config), feed_forward(layer, "", text, config)], 1
        )
    return x


def layers_without_image(w: Weights, config: ModelConfig, x: Tensor, mask: Tensor) -> Tensor:
    """A plain BERT: every token goes through the text's feed-forward."""
    for i in range(config.num_layers):
        layer = below(w, f"encoder.layer.{i}")
        x = attention_block(layer, "attention", x, x, config, mask)
        x = feed_forward(layer, "", x, config)
    return x


def ones_before(mask: Tensor, count: int) -> Tensor:
    return torch.cat([torch.ones(len(mask), count, dtype=mask.dtype), mask], dim=1)


def fusion_call(
    w: Weights, config: ModelConfig, queries: Tensor, ids: Tensor, mask: Tensor, image: Tensor
) -> Tensor:
    """Call 1. ``queries`` (B, Q, C), ``ids`` and ``mask`` (B, M), ``image`` (B, N, D) -> (B, Q + M, C)."""
    return layers_with_image(
        w,
        config,
        embedding_norm(w, config, queries),
        text_embeddings(w, config, ids),
        image,
        ones_before(mask, queries.shape[1]),
    )


def sentence_prompt_call(
    w: Weights, config: ModelConfig, queries: Tensor, ids: Tensor, mask: Tensor
) -> Tensor:
    """Call 2: queries, then text, no image. -> (B, Q + M, C)."""
    x = torch.cat([embedding_norm(w, config, queries), text_embeddings(w, config, ids)], dim=1)
    return layers_without_image(w, config, x, ones_before(mask, queries.shape[1]))


def target_call(w: Weights, config: ModelConfig, queries: Tensor, image: Tensor) -> Tensor:
    """Call 3: queries and an image, no text. -> (B, Q, C)."""
    return layers_with_image(w, config, embedding_norm(w, config, queries), None, image, None)


def text_only_call(w: Weights, config: ModelConfig, prompts: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Call 4: [CLS], prompts, other words; positions over all of them. -> (B, Q + M, C)."""
    embedded = words(w, ids)
    x = torch.cat([embedded[:, :1], prompts, embedded[:, 1:]], dim=1)
    keep = torch.cat([mask[:, :1], torch.ones(prompts.shape[:2], dtype=mask.dtype), mask[:, 1:]], dim=1)
    x = embedding_norm(w, config, x + positions(w, x.shape[1]))
    return layers_without_image(w, config, x, keep)


# --- fusion of the text into the image tokens. `w` holds the names below `gated_fusion`.


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    hidden = layer_norm(w, f"{name}.1", linear(w, f"{name}.0", x), FUSION_NORM_EPS)
    return linear(w, f"{name}.4", hidden.clamp(min=0))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@dataclass
class Fused:
    """What :func:`fuse` works out, all with a row for every image token."""

    fused: Tensor
    gate: Tensor | None
    delta: Tensor | None
    weights: Tensor | None = None  # (B, N, 1), what a token's gate is multiplied by


def cross(w: Weights, image: Tensor, text: Tensor, mask: Tensor) -> Fused:
    """Each image token attends to the words, with four heads, and is edited by what it read."""
    keys, values = text @ w["key.weight"].T, text @ w["value.weight"].T
    pair = torch.cat([image, attend(linear(w, "query", image), keys, values, 4, mask)], dim=-1)
    gate, delta = sigmoid(mlp(w, "gate_mlp", pair)), torch.tanh(mlp(w, "delta_mlp", pair))
    return Fused(image + w["alpha"] * gate * delta, gate, delta)


def select(w: Weights, image: Tensor, text: Tensor, top_k: int) -> Fused:
    """One sample and one token after the other; delta is zero where a token is not chosen."""
    form = w["relevance.1.weight"] @ w["relevance.0.weight"]
    found = []
    for tokens, text_words in zip(image, text, strict=True):
        s = linear(w, "text_proj", text_words[0]) if "text_proj.weight" in w else text_words[0]
        relevance = [token @ form @ s / math.sqrt(len(token)) for token in tokens]
        chosen = sorted(range(len(tokens)), key=lambda n: (-relevance[n].item(), n))[:top_k]
        total = sum(torch.exp(relevance[n]) for n in chosen)
        weights = [len(chosen) * torch.exp(relevance[n]) / total for n in chosen]
        c = sum(weight * tokens[n] for weight, n in zip(weights, chosen, strict=True)) / len(chosen)
        gate = sigmoid(mlp(w, "gate_mlp", torch.cat([s, c, s - c])))
        rows = []
        for n, token in enumerate(tokens):
            weight, delta = torch.zeros(1, dtype=token.dtype), torch.zeros_like(token)
            if n in chosen:
                weight = weights[chosen.index(n)][None]
                delta = torch.tanh(mlp(w, "delta_mlp", torch.cat([token, s, c])))
            rows.append((token + w["alpha"] * weight * gate * delta, gate, delta, weight))
        found.append([torch.stack(row) for row in zip(*rows, strict=True)])
    return Fused(*(torch.stack(samples) for samples in zip(*found, strict=True)))


def fuse(
    w: Weights,
    strategy: str,
    image: Tensor,
    text: Tensor,
    mask: Tensor,
    pool: str = "masked",
    top_k: int = 8,
) -> Fused:
    """The formula on N equal rows of text. ``image`` (B, N, D), ``text`` (B, M, Dt), ``mask`` (B, M)."""
    if strategy == "cross":
        return cross(w, image, text, mask)
    if strategy == "select":
        return select(w, image, text, top_k)
    means = []
    for tokens, keep in zip(text, mask, strict=True):
        chosen = [token for token, kept in zip(tokens, keep, strict=True) if kept or pool == "all"]
        means.append(sum(chosen) / len(chosen))
    t = torch.stack(means)
    if "text_proj.weight" in w:
        t = linear(w, "text_proj", t)
    t = t[:, None, :].expand(-1, image.shape[1], -1)
    pair = torch.cat([image, t], dim=-1)
    if strategy == "film":
        affine = linear(w, "generator", t)
        gamma, beta = 1 + affine[..., : image.shape[2]], affine[..., image.shape[2] :]
        return Fused(gamma * image + beta, None, None)
    if strategy == "tirg":
        gate = sigmoid(mlp(w, "gate_mlp", pair))
        return Fused(w["w_g"] * gate * image + w["w_r"] * mlp(w, "res_mlp", pair), gate, None)
    if strategy == "gmu":
        h_v, h_t = torch.tanh(image @ w["image_layer.weight"].T), torch.tanh(t @ w["text_layer.weight"].T)
        z = sigmoid(pair @ w["gate_layer.weight"].T)
        return Fused(z * h_v + (1 - z) * h_t, z, None)
    delta = torch.tanh(mlp(w, "delta_mlp", t))
    if strategy == "additive":
        return Fused(image + w["alpha"] * delta, None, delta)
    gate = sigmoid(mlp(w, "gate_mlp", pair))
    if strategy == "gated":
        return Fused(image + w["alpha"] * gate * delta, gate, delta)
    assert strategy == "weighted"
    return Fused(gate * (image + delta) + (1 - gate) * image, gate, delta)


# --- losses, as loops over the batch


def similarity(query: Tensor, targets: Tensor) -> Tensor:
    """One query (C,) and one target's tokens (Q, C): the largest product."""
    return max(torch.dot(query, token) for token in targets)


def contrastive_loss(queries: Tensor, targets: Tensor, temp: Tensor) -> Tensor:
    """Cross-entropy of every query (B, C) against all targets (B, Q, C), the own one being right."""
    total = torch.zeros((), dtype=queries.dtype)
    for i, query in enumerate(queries):
        scores = [similarity(query, target) / temp for target in targets]
        total = total + torch.log(sum(torch.exp(score - scores[i]) for score in scores))
    return total / len(queries)


def complementary_loss(queries: Tensor, targets: Tensor, temp: Tensor) -> Tensor:
    """Minus the log of one less each wrong target's share of the softmax, over the queries' mean."""
    total = torch.zeros((), dtype=queries.dtype)
    for i, query in enumerate(queries):
        shares = torch.stack([torch.exp(similarity(query, target) / temp) for target in targets])
        for j, share in enumerate(shares / shares.sum()):
            if j != i:
                total = total - torch.log(1 - share)
    return total / len(queries)


def align_loss(fusion_outputs: Tensor, prompt_tokens: Tensor) -> Tensor:
    """Mean square difference of two means over tokens; no gradient to the prompts."""
    batch, count, width = fusion_outputs.shape
    prompt = sum(token for token in prompt_tokens[0]).detach() / count
    total = torch.zeros((), dtype=fusion_outputs.dtype)
    for tokens in fusion_outputs:
        mean = sum(token for token in tokens) / count
        for channel in range(width):
            total = total + (mean[channel] - prompt[channel]) ** 2
    return total / (batch * width)


# --- the whole model


@dataclass
class Query:
    """The composed query of a batch."""

    f: Tensor  # (B, E)
    fusion_outputs: Tensor  # (B, Q, C)
    reference: Tensor  # (B, N, D), the reference's tokens as call 1 saw them


def compose(w: Weights, config: ModelConfig, reference: Tensor, ids: Tensor, mask: Tensor) -> Query:
    """Reference tokens (B, N, D), after ``ln_vision``, and text -> the query vector."""
    bert = below(w, "Qformer.bert")
    if config.use_gated_fusion:
        text = text_embeddings(bert, config, ids)
        if config.fusion_text == "contextual":
            text = layers_without_image(bert, config, text, mask)
        reference = fuse(
            below(w, "gated_fusion"),
            config.fusion_strategy,
            reference,
            text,
            mask,
            config.pool,
            config.fusion_top_k,
        ).fused
    queries = w["query_tokens"].expand(len(ids), -1, -1)
    count = config.num_query_tokens
    fusion_outputs = fusion_call(bert, config, queries, ids, mask, reference)[:, :count]
    output = sentence_prompt_call(bert, config, fusion_outputs, ids, mask)
    return Query(unit(linear(w, "text_proj", output[:, count])), fusion_outputs, reference)


def target_features(w: Weights, config: ModelConfig, image: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, Q, E), unit vectors."""
    tokens = image_tokens(w, config, image)
    queries = w["query_tokens"].expand(len(image), -1, -1)
    return unit(linear(w, "vision_proj", target_call(below(w, "Qformer.bert"), config, queries, tokens)))


def text_only_query(w: Weights, config: ModelConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, M) -> (B, E), unit vectors."""
    prompts = w["prompt_tokens"].expand(len(ids), -1, -1)
    output = text_only_call(below(w, "Qformer.bert"), config, prompts, ids, mask)
    return unit(linear(w, "text_proj", output[:, 0]))


def match(
    w: Weights, config: ModelConfig, prompts: Tensor, ids: Tensor, mask: Tensor, image: Tensor
) -> Tensor:
    """The re-ranker: prompts (B, P, C), text (B, M) and a candidate's tokens (B, N, D) -> (B,)."""
    bert = below(w, "Qformer.bert")
    queries = w["query_tokens"].expand(len(ids), -1, -1)
    beside = torch.cat([embedding_norm(bert, config, prompts), text_embeddings(bert, config, ids)], dim=1)
    count = queries.shape[1]
    seen = ones_before(mask, count + prompts.shape[1])
    output = layers_with_image(bert, config, embedding_norm(bert, config, queries), beside, image, seen)
    logits = linear(w, "itm_head", output[:, :count])
    no, yes = (sum(query[:, kind] for query in logits.unbind(dim=1)) / count for kind in (0, 1))
    return yes - no


def similarities(queries: Tensor, targets: Tensor) -> Tensor:
    """(B, E) and (G, Q, E) -> (B, G)."""
    return torch.stack([torch.stack([similarity(query, target) for target in targets]) for query in queries])


def losses(
    w: Weights, config: ModelConfig, image: Tensor, target: Tensor, ids: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The three losses of a batch of triplets."""
    query = compose(w, config, image_tokens(w, config, image), ids, mask)
    targets = target_features(w, config, target)
    return {
        "loss_itc": contrastive_loss(query.f, targets, w["temp"]),
        "loss_rtc": contrastive_loss(text_only_query(w, config, ids, mask), targets, w["temp"]),
        "loss_align": align_loss(query.fusion_outputs, w["prompt_tokens"]),
    }
