"""BLIP-2's Q-Former: one BERT that reads learned queries, a text and an image (Li et al. 2023, section 3.1).

SPRC calls it in four ways (see ``blip2_qformer_cir_align_prompt.py``). Two things differ from BLIP-2's:
without an image *all* tokens take the text's feed-forward, and the text-only call puts the queries
between [CLS] and the words. Parameter names are LAVIS's, because they are the checkpoint format.

Shapes: B batch, Q queries, M text tokens, L = Q + M, C hidden width, N image tokens, D image width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.cls["predictions"].decoder.weight = self.bert.embeddings.word_embeddings.weight


def initialise(module: nn.Module, std: float) -> None:
    """BERT's start: normal weights, zero biases, a zero vector for padding."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight.data[module.padding_idx])


class Bert(nn.Module):
    """Embeddings and layers. Returns the last hidden state."""

    def __init__(self, embeddings: "Embeddings", layers: list["Layer"]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self,
        input_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        no_img: bool = False,
    ) -> Tensor:
        """Run the Q-Former.

        Args:
            input_ids: (B, M) text, or None for queries alone.
            query_embeds: (B, Q, C), or None for text alone.
            attention_mask: (B, L) of ones (seen) and zeros (hidden); None sees all.
            encoder_hidden_states: (B, N, D) image tokens; None runs without cross-attention.
            no_img: the text-only order: [CLS], the queries, the other words, with positions over all.

        Returns:
            (B, L, C).
        """
        hidden = self.embeddings(input_ids, query_embeds, no_img)
        num_queries = 0 if query_embeds is None else query_embeds.shape[1]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # (B, 1, 1, L)
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, num_queries, mask, encoder_hidden_states)
        return hidden


class Embeddings(nn.Module):
    """Word and position embeddings, joined with the queries, normalised together."""

    def __init__(
        self, vocab_size: int, max_positions: int, hidden_size: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("position_ids", torch.arange(max_positions)[None])  # in LAVIS's checkpoints

    def forward(
        self, input_ids: Tensor | None, query_embeds: Tensor | None = None, no_img: bool = False
    ) -> Tensor:
        """(B, M) ids and (B, Q, C) queries, either of them None, to (B, Q + M, C)."""
        if input_ids is None:
            hidden = query_embeds
        else:
            words = self.word_embeddings(input_ids)
            if no_img:
                hidden = torch.cat([words[:, :1], query_embeds, words[:, 1:]], dim=1)
                hidden = hidden + self.position_embeddings(self.position_ids[:, : hidden.shape[1]])
            else:
                hidden = words + self.position_embeddings(self.position_ids[:, : words.shape[1]])
                if query_embeds is not None:
                    hidden = torch.cat([query_embeds, hidden], dim=1)
        return self.dropout(self.LayerNorm(hidden))


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

    def forward(self, hidden: Tensor, num_queries: int, mask: Tensor | None, image: Tensor | None) -> Tensor:
        """(B, L, C) to (B, L, C); the first ``num_queries`` tokens are the queries when there is an image."""
        hidden = self.attention(hidden, hidden, mask)
        if image is None:
            return self.output(self.intermediate(hidden), hidden)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if self.crossattention is not None:
            queries = self.crossattention(queries, image)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] == 0:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)], dim=1)


class Attention(nn.Module):
    """Multi-head attention, then projection, dropout, residual and LayerNorm (post-norm, as in BERT)."""

    def __init__(
        self, hidden_size: int, context_width: int, num_heads: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.self = AttentionHeads(hidden_size, context_width, num_heads, dropout)
        self.output = ResidualOutput(hidden_size, hidden_size, norm_eps, dropout)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, C) asks (B, N, context_width); the mask is True where a token may be seen."""
        return self.output(self.self(hidden, context, mask), hidden)


class AttentionHeads(nn.Module):
    """The heads alone: softmax(Q K' / sqrt(d)) V, with dropout on the weights in training."""

    def __init__(self, hidden_size: int, context_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(context_width, hidden_size)
        self.value = nn.Linear(context_width, hidden_size)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, C) and (B, N, context_width) to (B, L, C)."""
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, tokens, C / heads)
            for x in (self.query(hidden), self.key(context), self.value(context))
        )
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
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
