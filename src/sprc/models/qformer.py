"""BLIP-2's Q-Former: one BERT that reads learned queries, a text and an image (Li et al. 2023, section 3.1).

SPRC calls it in four ways (see ``blip2_qformer_cir_align_prompt.py``). Two things differ from BLIP-2's:
without an image *all* tokens take the text's feed-forward, and the text-only call puts the queries
between [CLS] and the words. Parameter names are LAVIS's, because they are the checkpoint format.

Captions differ in length, so the layers work on rows, one for each token that is seen, and no row is padding.
Only inside attention do they stand in a padded batch; :class:`Layout` says where.

Shapes: B batch, Q queries, M text tokens, L = Q + M, R rows, C hidden width, N image tokens, D image width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# For each layer the image's keys and values, (B, N, C) each; None for a layer without cross-attention.
ImageKeys = list[Optional[tuple[Tensor, Tensor]]]


class ScaledImage(NamedTuple):
    """Image tokens x * weight + bias, not worked out: W (x * weight + bias) = (W * weight) x + W bias.

    So weight and bias get their gradients by way of W's, and the (B, N, D) tokens need none at all:
    where these are a frozen vision transformer's, that saves one of the three products that a key or a value
    takes, forward and backward.
    """

    tokens: Tensor  # (B, N, D), without gradient
    weight: Tensor  # (D,)
    bias: Tensor  # (D,)


# What a layer sees of the images: tokens, or keys and values.
Seen = Union[Tensor, ScaledImage, tuple[Tensor, Tensor], None]


def compute_type(like: Tensor) -> torch.dtype:
    """The type of a matrix product of tensors like this one: autocast's where it is on, else their own."""
    nothing = like.new_empty(0, 0)
    return torch.mm(nothing, nothing).dtype


def cast_once(image: Tensor | ScaledImage) -> Tensor | ScaledImage:
    """Image tokens in the type that the products take them in.

    Autocast would make a copy for each key and value of each layer, and keep all of them for the gradients.
    """
    if isinstance(image, ScaledImage):
        return image._replace(tokens=image.tokens.to(compute_type(image.tokens)))
    return image.to(compute_type(image))


def batch_of(image: Tensor | ScaledImage | ImageKeys) -> int:
    """B."""
    if isinstance(image, ScaledImage):
        return len(image.tokens)
    if isinstance(image, Tensor):
        return len(image)
    return next(len(keys[0]) for keys in image if keys is not None)


class Layout(NamedTuple):
    """Which rows a call has, and where each stands in a padded batch of L = Q + M tokens.

    The queries' rows come sample by sample; the text's come word by word, so that the B rows of [CLS] are the
    first of them. Without text there is no padding, and the tensors are None.
    """

    batch: int
    num_queries: int
    before: int = 0  # text rows that come before the queries' rows
    bias: Tensor | None = None  # (B, 1, 1, L), added to attention's logits: 0, or -inf where nothing is seen
    words: Tensor | None = None  # (R - B * Q,) b * M + m: the text's rows among its (B * M) tokens
    place: Tensor | None = None  # (R,) b * L + position

    @classmethod
    def of(cls, text_mask: Tensor, num_queries: int, *, cls_first: bool, words: Tensor) -> Layout:
        """The layout of captions with ``num_queries`` queries before them.

        Args:
            text_mask: (B, M) of True (seen) and False (padding), on the CPU: no waiting for a GPU here.
            num_queries: Q.
            cls_first: the rows are [CLS], queries, other words; else queries, text.
            words: any tensor on the layers' device and of their type.
        """
        batch, length = text_mask.shape
        m, b = text_mask.T.nonzero(as_tuple=True)
        places = torch.arange(batch * (num_queries + length)).view(batch, -1)
        query_places, text_places = places[:, :num_queries].flatten(), places[b, num_queries + m]
        before = batch if cls_first else 0
        place = torch.cat([text_places[:before], query_places, text_places[before:]])
        seen = torch.cat([text_mask.new_ones(batch, num_queries), text_mask], dim=1)
        bias = torch.zeros(seen.shape, dtype=compute_type(words)).masked_fill_(~seen, -torch.inf)
        index = (bias[:, None, None, :], b * length + m, place)
        return cls(batch, num_queries, before, *(x.to(words.device, non_blocking=True) for x in index))

    def rows(self, queries: Tensor, text: Tensor) -> Tensor:
        """(B, Q, C) and (B, M, C) to the (R, C) rows."""
        text = Pick.apply(text.flatten(0, 1), self.words)
        return torch.cat([text[: self.before], queries.flatten(0, 1), text[self.before :]])

    def pad(self, rows: Tensor) -> Tensor:
        """(R, C) to (B, L, C), zeros where nothing is seen."""
        if self.place is None or self.bias is None:
            return rows.unflatten(0, (self.batch, -1))
        length = self.bias.shape[-1]
        return Spread.apply(rows, self.place, self.batch * length).unflatten(0, (self.batch, length))

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, L, C) to (R, C)."""
        rows = padded.flatten(0, 1)
        return rows if self.place is None else Pick.apply(rows, self.place)


class Pick(torch.autograd.Function):
    """``rows[places]``, no row twice, so that the gradient is a copy; torch's own adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        """(P, C) and (R,) to (R, C)."""
        ctx.save_for_backward(places)
        ctx.length = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """(R, C) to (P, C)."""
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, grad.shape[1]).index_copy(0, places, grad), None


class Spread(torch.autograd.Function):
    """The reverse: each of the R rows to its place among ``length``, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, length: int) -> Tensor:
        """(R, C) and (R,) to (length, C)."""
        ctx.save_for_backward(places)
        return rows.new_zeros(length, rows.shape[1]).index_copy(0, places, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """(length, C) to (R, C)."""
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class QFormer(nn.Module):
    """``bert`` does the work; ``cls`` is BLIP-2's language-model head, kept for the checkpoint format."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        image_width: int,
        cross_attention_every: int = 2,
        max_positions: int = 512,
        norm_eps: float = 1e-12,
        dropout: float = 0.1,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.bert = Bert(
            Embeddings(vocab_size, max_positions, hidden_size, norm_eps, dropout),
            [
                Layer(
                    hidden_size,
                    num_heads,
                    intermediate_size,
                    image_width if index % cross_attention_every == 0 else None,
                    norm_eps,
                    dropout,
                )
                for index in range(num_layers)
            ],
        )
        self.cls = nn.ModuleDict({"predictions": LanguageModelHead(vocab_size, hidden_size, norm_eps)})
        self.apply(lambda module: initialise(module, initializer_range))
        # Tied in LAVIS too: one tensor under two names, so the head follows the words it predicts.
        head = cast(LanguageModelHead, self.cls["predictions"])
        head.decoder.weight = self.bert.embeddings.word_embeddings.weight


def initialise(module: nn.Module, std: float) -> None:
    """BERT's start: normal weights, zero biases, a zero vector for padding."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight.data[module.padding_idx])


class Bert(nn.Module):
    """The layers. The embeddings are called on their own, because several calls share a text's."""

    def __init__(self, embeddings: Embeddings, layers: list[Layer]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    @property
    def layers(self) -> list[Layer]:
        """In their order."""
        return cast("list[Layer]", list(cast(nn.ModuleList, self.encoder["layer"])))

    def image_keys(self, image: Tensor) -> ImageKeys:
        """(B, N, D) image tokens to what :meth:`forward` takes in their place, for an image read twice."""
        tokens = cast_once(image)
        return [
            None if layer.crossattention is None else layer.crossattention.self.keys_values(tokens)
            for layer in self.layers
        ]

    def forward(
        self,
        hidden: Tensor,
        layout: Layout,
        image: Tensor | ScaledImage | ImageKeys | None = None,
        wanted: int | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden: (R, C), the embedded rows. With an image the queries' rows come first.
            layout: where the rows stand.
            image: (B, N, D) image tokens, or what :meth:`image_keys` made of them; None runs without
                cross-attention, all rows as text.
            wanted: how many rows a sample the caller reads, the first; the last layer computes no others.

        Returns:
            (R, C), or (B, wanted, C).
        """
        if isinstance(image, (Tensor, ScaledImage)):
            image = cast_once(image)
        *layers, last = self.layers
        seen_by = cast("list[Seen]", image if isinstance(image, list) else [image] * (len(layers) + 1))
        *images, last_image = seen_by
        has_image = image is not None
        for layer, seen in zip(layers, images):
            hidden = layer(hidden, layout, seen, has_image)
        hidden = last(hidden, layout, last_image, has_image, wanted)
        return hidden if wanted is None else hidden.unflatten(0, (layout.batch, wanted))


class Embeddings(nn.Module):
    """Word and position embeddings, normalised; queries are normalised by the same LayerNorm."""

    def __init__(
        self, vocab_size: int, max_positions: int, hidden_size: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("position_ids", torch.arange(max_positions)[None])  # in LAVIS's checkpoints

    def forward(self, tokens: Tensor, first: int | None = None, start: int | None = None) -> Tensor:
        """Words (with positions) or queries (without, but in call 4), (B, tokens, C), to the same shape.

        Args:
            tokens: word embeddings, or queries.
            first: position of the first token; None adds no positions.
            start: position of the second, from where they run on; by default ``first + 1``.
        """
        if first is not None:
            start = first + 1 if start is None else start
            weight = self.position_embeddings.weight
            positions = torch.cat([weight[first : first + 1], weight[start : start + tokens.shape[1] - 1]])
            tokens = tokens + positions
        return self.dropout(self.LayerNorm(tokens))


class Layer(nn.Module):
    """Self-attention over queries and text; the image only through the queries' cross-attention.

    ``image_width`` is D where the layer has cross-attention, else None.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        image_width: int | None,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, hidden_size, num_heads, norm_eps, dropout)
        self.crossattention = (
            Attention(hidden_size, image_width, num_heads, norm_eps, dropout) if image_width else None
        )
        self.intermediate = Intermediate(hidden_size, intermediate_size)
        self.output = ResidualOutput(intermediate_size, hidden_size, norm_eps, dropout)
        self.intermediate_query = Intermediate(hidden_size, intermediate_size)
        self.output_query = ResidualOutput(intermediate_size, hidden_size, norm_eps, dropout)

    def forward(
        self,
        hidden: Tensor,
        layout: Layout,
        image: Seen,
        has_image: bool,
        wanted: int | None = None,
    ) -> Tensor:
        """(R, C) to (R, C), or to the (B * wanted, C) first rows; see :class:`Bert`."""
        hidden = self.attention.among_rows(hidden, layout, wanted)
        if not has_image:
            return self.output(self.intermediate(hidden), hidden)
        num_queries = layout.batch * layout.num_queries
        queries, text = hidden[:num_queries], hidden[num_queries:]
        if self.crossattention is not None and image is not None:
            queries = self.crossattention.to_image(queries, layout, image)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if len(text) == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)])


class Attention(nn.Module):
    """Multi-head attention, then projection, dropout, residual and LayerNorm (post-norm, as in BERT)."""

    def __init__(
        self, hidden_size: int, context_width: int, num_heads: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.self = AttentionHeads(hidden_size, context_width, num_heads, dropout)
        self.output = ResidualOutput(hidden_size, hidden_size, norm_eps, dropout)

    def among_rows(self, hidden: Tensor, layout: Layout, wanted: int | None) -> Tensor:
        """The (R, C) rows of each sample ask each other: (R, C), or the first (B * wanted, C)."""
        key, value = (layout.pad(x) for x in self.self.keys_values(hidden))
        if wanted is None:
            query = layout.pad(self.self.query(hidden))
            return self.output(layout.unpad(self.self(query, key, value, layout.bias)), hidden)
        asking = hidden[: layout.batch * wanted]
        query = self.self.query(asking).unflatten(0, (layout.batch, wanted))
        return self.output(self.self(query, key, value, layout.bias).flatten(0, 1), asking)

    def to_image(
        self, queries: Tensor, layout: Layout, image: Tensor | ScaledImage | tuple[Tensor, Tensor]
    ) -> Tensor:
        """The (B * Q, C) queries ask their images: (B, N, D) tokens, or their keys and values."""
        if isinstance(image, (Tensor, ScaledImage)):
            key, value = self.self.keys_values(image)
        else:
            key, value = image
        query = self.self.query(queries).unflatten(0, (layout.batch, -1))
        return self.output(self.self(query, key, value).flatten(0, 1), queries)


class AttentionHeads(nn.Module):
    """The heads alone: softmax(Q K' / sqrt(d)) V, with dropout on the weights in training."""

    def __init__(self, hidden_size: int, context_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(context_width, hidden_size)
        self.value = nn.Linear(context_width, hidden_size)

    def keys_values(self, context: Tensor | ScaledImage) -> tuple[Tensor, Tensor]:
        """(..., context_width) to keys and values, (..., C) each."""
        if isinstance(context, Tensor):
            return self.key(context), self.value(context)
        tokens, weight, bias = context
        key, value = (
            F.linear(tokens, linear.weight * weight, F.linear(bias, linear.weight, linear.bias))
            for linear in (self.key, self.value)
        )
        return key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Projected (B, L, C) queries, (B, N, C) keys and values, and a layout's bias, to (B, L, C)."""
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, tokens, C / heads)
            for x in (query, key, value)
        )
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        return heads.transpose(1, 2).flatten(2)


class Intermediate(nn.Module):
    """First half of a feed-forward: widen, exact GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., intermediate)."""
        return F.gelu(self.dense(hidden))


class ResidualOutput(nn.Module):
    """Project, drop out, add the residual, normalise."""

    def __init__(self, in_width: int, out_width: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, out_width)
        self.LayerNorm = nn.LayerNorm(out_width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(..., in_width) and the residual (..., out_width) to (..., out_width)."""
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class LanguageModelHead(nn.Module):
    """BERT's word predictor. SPRC never calls it; it is here so that checkpoints load strictly."""

    def __init__(self, vocab_size: int, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(hidden_size, hidden_size),
                "LayerNorm": nn.LayerNorm(hidden_size, eps=norm_eps),
            }
        )
        self.decoder = nn.Linear(hidden_size, vocab_size)
        self.bias = self.decoder.bias  # saved under both names, as in LAVIS
