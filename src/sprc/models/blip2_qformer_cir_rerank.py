"""A re-ranker for SPRC: a second stage that reads reference, text and candidate together.

The first stage, an SPRC model, turns reference and text into a sentence prompt (its call 1) and a query; it
finds candidates. This model looks at each candidate again, with all that the first stage knows of the query
beside it. One call of a Q-Former. B pairs of a query and a candidate, Q = 32 queries, P = 32 vectors of the
prompt, M text tokens, N image tokens, D image width, C = 768 hidden width:

    self-attention over   queries, prompt, words                      (B, Q + P + M, C)
    cross-attention of    the queries to the candidate's tokens       (B, N, D)
    output                mean over the queries of itm_head           (B, 2), no and yes
    score                 yes minus no, the logit of a match          (B,)

The queries take the image's feed-forward; prompt and words take the text's, as in SPRC's call 2, where they
stand side by side as well. The candidate reaches the query's vectors by self-attention alone.

What is from where:

- BLIP-2 (Li et al. 2023, section 3.1): image-text matching, that is the layout of the call, `itm_head` on
  each query's output and the mean over the queries; negatives that are drawn by the contrast's similarity.
- Candidate-Reranking (Liu et al., TMLR 2024): a second stage over the first stage's candidates, to which the
  query is given as the first stage's vectors and the text, and a loss that contrasts the target's score with
  those of other images.
- SPRC (Bai et al., ICLR 2024) reports a second stage, SPRC2, whose code was not released. That the vectors
  are SPRC's sentence prompt, and that training starts from the first stage's weights, is this project's
  choice.

Parameter names are those of the first stage, whose checkpoint it starts from. `prompt_tokens`, `vision_proj`,
`text_proj` and `temp` have no use here; they stay for the checkpoint format and do not learn.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sprc.config import ModelConfig
from sprc.errors import InputError
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.qformer import ImageKeys, Layout, ScaledImage
from sprc.models.tokenizer import WordPiece

# `prompts` (B, P, C), `text_input` B captions, `candidates` (B, 1 + K, ...), the target first.
Samples = dict[str, Any]


class Beside(NamedTuple):
    """What stands beside the queries in self-attention: the prompts and the words of B queries."""

    tokens: Tensor  # (B, P + M, C), embedded
    layout: Layout


class Blip2QformerCirRerank(Blip2Qformer):
    """The model `blip2_cir_rerank`.

    Args:
        config: the first stage's, its fusion off: what that edits is in the prompts.
        tokenizer: the first stage's.
    """

    compiled: ClassVar[str] = "match"

    def __init__(self, config: ModelConfig, tokenizer: WordPiece) -> None:
        if config.use_gated_fusion:
            raise InputError(
                "a re-ranker has no fusion of its own: that of its first stage is in the prompts"
            )
        if not config.freeze_vit:
            raise InputError(
                "a re-ranker reads the tokens of a frozen vision transformer; that of its first stage learns"
            )
        super().__init__(config, tokenizer)
        self.diagnostics: dict[str, Tensor] = {}
        # All that requires a gradient gets one in every step. Of the last layer the queries alone are read.
        last = f"bert.encoder.layer.{config.num_layers - 1}."
        unused = ("cls.", f"{last}intermediate.", f"{last}output.")
        for name, parameter in self.Qformer.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)
        # Tied to the language head's matrix, which is one of the unused names.
        self.Qformer.bert.embeddings.word_embeddings.weight.requires_grad_(True)
        for parameter in (self.prompt_tokens, self.temp, *self.vision_proj.parameters()):
            parameter.requires_grad_(False)
        self.text_proj.requires_grad_(False)
        self.train()

    def forward(self, samples: Samples) -> dict[str, Tensor]:
        """The loss of a batch of queries.

        Args:
            samples: `prompts` (B, P, C) of the first stage; `text_input` B captions; `candidates`,
                (B, 1 + K, 3, S, S) pixels or (B, 1 + K, N, D) tokens of the frozen vision transformer: the
                target and K other images.

        Returns:
            `loss_itm`, an unweighted scalar.
        """
        return self.losses_of(self.embed(samples))

    def read_images(self, samples: Samples) -> Samples:
        """The samples with a frozen vision transformer's tokens in place of pixels; else as they are."""
        images = samples["candidates"]
        if images.dim() == 4:
            return samples
        tokens = self.vit_tokens(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return {**samples, "candidates": tokens}

    def embed(self, samples: Samples) -> dict[str, Tensor]:
        """`scores`, (B, 1 + K): of each query's candidates. A row depends on its own query alone."""
        images = samples["candidates"]
        batch, each = images.shape[:2]
        captions = [caption for caption in samples["text_input"] for _ in range(each)]
        beside = self.beside(samples["prompts"].repeat_interleave(each, dim=0), captions)
        # Autocast on a CPU does not join cached tokens of another half precision than its own.
        with torch.autocast(self.device.type, enabled=False):
            candidates = self.to_be_read(self.vit_tokens(images.flatten(0, 1)))
        return {"scores": self.match(candidates, beside).unflatten(0, (batch, each))}

    def losses_of(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the target among its candidates: -log softmax(scores)[0], the queries' mean."""
        scores = embeddings["scores"].float()
        return {"loss_itm": F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64))}

    def beside(self, prompts: Tensor, captions: list[str]) -> Beside:
        """The first stage's prompts (B, P, C) and B captions, as the queries see them."""
        ids, mask = self.pad([self.caption_ids[caption] for caption in captions])
        embed = self.Qformer.bert.embeddings
        words = embed.word_embeddings(ids.to(self.device, non_blocking=True))
        prompts = prompts.to(words.device, words.dtype)
        seen = torch.cat([mask.new_ones(prompts.shape[:2]), mask], dim=1)
        layout = Layout.of(seen, self.config.num_query_tokens, cls_first=False, words=words)
        return Beside(torch.cat([embed(prompts), embed(words, 0)], dim=1), layout)

    def match(self, candidates: Tensor | ScaledImage | ImageKeys, beside: Beside) -> Tensor:
        """The score of B candidates, each for its query: (B,), the logit of a match, float32.

        Args:
            candidates: (B, N, D) normalised image tokens, or ``Qformer.bert.image_keys`` of them.
            beside: from :meth:`beside`.
        """
        layout = beside.layout
        queries = self.Qformer.bert.embeddings(self.query_tokens.expand(layout.batch, -1, -1))
        rows = layout.rows(queries, beside.tokens)
        output = self.Qformer.bert(rows, layout, candidates, wanted=layout.num_queries)  # (B, Q, C)
        no, yes = self.itm_head(output).float().mean(dim=1).unbind(dim=1)
        return yes - no
