"""SPRC (Sentence-level Prompts Benefit Composed Image Retrieval, ICLR 2024) with gated fusion.

One Q-Former, called in four ways. B batch, Q = 32 queries, M = 32 text tokens, N image tokens,
D image width, C = 768 hidden width, E = 256 embedding width:

    1. fusion           queries + text, reference image  ->  (B, Q + M, C), the first Q are the prompt
    2. sentence prompt  prompt + text, no image          ->  f = text_proj(output[:, Q]), (B, E)
    3. target           queries, target image            ->  T = vision_proj(output), (B, Q, E)
    4. text only        [CLS], prompts, words, no image  ->  p = text_proj(output[:, 0]), (B, E)

Calls 2 and 4 have the same rows and run as one batch in training. A caption is tokenized and its words are
looked up once. The frozen vision transformer's tokens may come from a feature cache in place of pixels.

With ``use_gated_fusion`` the text edits the reference's image tokens before call 1; the target's tokens
are never edited. Without it the model is plain SPRC and has no fusion parameter.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.config import CONTRASTS, ModelConfig
from sprc.distributed import rank
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.gated_fusion import FusionOutput, at_least_float32, fusion_class
from sprc.models.losses import align_loss, complementary_loss, contrastive_loss, gather_rows, similarity
from sprc.models.qformer import ImageKeys, Layout, ScaledImage, batch_of
from sprc.models.switches import Switches
from sprc.models.tokenizer import WordPiece

# `image` and `target`, tensors, and `text_input`, a list of captions.
Samples = dict[str, Any]


class Text(NamedTuple):
    """B captions as the Q-Former reads them.

    The layouts depend on the captions' lengths, which only the CPU knows. So they are made beside the words,
    and what follows is all tensors: ``torch.compile`` sees one graph.
    """

    words: Tensor  # (B, M, C) word embeddings, without positions
    mask: Tensor  # (B, M), True where there is a word and not padding
    call_1: Layout
    call_2: Layout  # call 4 has the same rows
    calls_2_and_4: Layout  # both as one batch of 2 B
    alone: Layout  # the words without queries
    words_of_call_2: Tensor | None = None  # where a second Q-Former has its own


class Blip2QformerCirAlignPrompt(Blip2Qformer):
    """The model `blip2_cir_align_prompt`. Parameter names are LAVIS's and SPRC's checkpoint format.

    Args:
        config: widths, depths, epsilons and switches.
        tokenizer: a BERT tokenizer of ``config.vocab_size`` entries.
    """

    compiled: ClassVar[str] = "embed_tokens"

    def __init__(self, config: ModelConfig, tokenizer: WordPiece) -> None:
        # Looked up before anything large is built: an unknown name is refused at once.
        strategy = fusion_class(config.fusion_strategy) if config.use_gated_fusion else None
        super().__init__(config, tokenizer)

        # Built last, so that one seed gives the same other weights with fusion and without.
        self.gated_fusion = None
        if strategy is not None:
            self.gated_fusion = strategy(
                config.vit_width,
                config.hidden_size,
                dropout=config.fusion_dropout,
                alpha_init=config.alpha_init,
                pool=config.pool,
                start=config.fusion_start,
                width=config.fusion_width,
                top_k=config.fusion_top_k,
            )
            self.gated_fusion.switches = Switches(config, tokenizer)  # into the state dict, no parameter
        self.diagnostics: dict[str, Tensor] = {}
        self.contrast = CONTRASTS[0]  # of training; no part of the model

        # No loss of this model reaches BLIP-2's matching and language heads; they stay for the
        # checkpoint format. (The language head's word matrix is tied to the embeddings and is trained.)
        # So all that requires a gradient gets one in every step, and DistributedDataParallel need not search
        # for what does not.
        self.itm_head.requires_grad_(False)
        for name, parameter in self.Qformer.cls.named_parameters():
            parameter.requires_grad_(name == "predictions.decoder.weight")
        self.train()

    def forward(self, samples: Samples) -> dict[str, Tensor]:
        """The losses of a batch of triplets.

        Args:
            samples: `image` references and `target`, each (B, 3, S, S) pixels or (B, N, D) tokens of the
                frozen vision transformer; `text_input` B captions.

        Returns:
            `loss_itc`, `loss_rtc`, `loss_align`: unweighted scalars. With ``contrast`` "complementary" also
            `loss_itc_complementary` and `loss_rtc_complementary`.
        """
        return self.losses_of(self.embed(samples))

    def read_images(self, samples: Samples) -> Samples:
        """The samples with a frozen vision transformer's tokens in place of pixels; else as they are.

        So that what no gradient reaches is computed once where :meth:`embed` runs twice (gradient caching).
        """
        if not self.config.freeze_vit or samples["image"].dim() == 3:
            return samples
        image, target = self.vit_tokens(torch.cat([samples["image"], samples["target"]])).chunk(2)
        return {**samples, "image": image, "target": target}

    def embed(self, samples: Samples) -> dict[str, Tensor]:
        """All that the losses need of a batch, see :meth:`embed_tokens`, and `temp`, which has no rows.

        A row depends on its own triplet alone: batches may be embedded in parts.
        """
        # Autocast on a CPU does not join cached tokens of another half precision than its own.
        with torch.autocast(self.device.type, enabled=False):
            images = torch.cat([samples["image"], samples["target"]])  # one pass through the ViT for both
        rows = self.embed_tokens(self.vit_tokens(images), self.tokenize(samples["text_input"]))
        return {**rows, "temp": self.temp}

    def embed_tokens(self, tokens: Tensor, text: Text) -> dict[str, Tensor]:
        """The same from the tokens on: all that is trained when the vision transformer is frozen.

        Args:
            tokens: (2 B, N, D) tokens of the vision transformer, the B references first.
            text: B captions.

        Returns:
            `query` and `text`, (B, E): f and p. `target`, (B, Q, E): T. `prompts`, (B, 1, C): the mean of the
            fusion outputs.
        """
        reference, target = tokens.chunk(2)
        # The fusion edits a reference's tokens; all others are read as keys and values alone.
        prepare = self.to_be_read if self.gated_fusion is None else self.normalise
        prompts = self.prompts_of(prepare(reference), text)
        query_feats, text_feats = self.compose_and_text_features(prompts, text)
        return {
            "query": query_feats,
            "text": text_feats,
            "target": self.target_features(self.to_be_read(target)),
            "prompts": prompts.mean(dim=1, keepdim=True),
        }

    def losses_of(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses, from what :meth:`embed` gives. The negatives are those of all ranks."""
        queries, text, temp = embeddings["query"], embeddings["text"], embeddings["temp"]
        targets, first = gather_rows(embeddings["target"]), rank() * len(queries)
        losses = {
            "loss_itc": contrastive_loss(queries, targets, temp, first),
            "loss_rtc": contrastive_loss(text, targets, temp, first),
            "loss_align": align_loss(embeddings["prompts"], self.prompt_tokens),
        }
        if self.contrast == "complementary":
            losses["loss_itc_complementary"] = complementary_loss(queries, targets, temp, first)
            losses["loss_rtc_complementary"] = complementary_loss(text, targets, temp, first)
        return losses

    @torch.no_grad()
    def inference(self, reference_embeds: Tensor, target_feats: Tensor, text: list[str]) -> Tensor:
        """Similarity of B queries to a gallery.

        Args:
            reference_embeds: (B, N, D), image tokens from :meth:`extract_target_features`.
            target_feats: (G, Q, E), the gallery's features from the same method.
            text: B captions.

        Returns:
            (B, G).
        """
        return similarity(self.compose(reference_embeds, self.tokenize(text)), target_feats)

    @torch.no_grad()
    def extract_target_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) images to their features as targets (B, Q, E) and tokens as references (B, N, D)."""
        image_embeds = self.encode_image(image)
        return self.target_features(image_embeds), image_embeds

    def tokenize(self, text: list[str]) -> Text:
        """B captions, cleaned, cut to ``max_txt_len`` tokens and padded to the longest of them.

        What is masked is not computed, so padding further would change nothing; only the mean over all
        positions (``pool="all"``) sees it, and gets all ``max_txt_len``.
        """
        return self.look_up([self.caption_ids[caption] for caption in text])

    def look_up(self, rows: list[list[int]]) -> Text:
        """The same of the token ids of B captions, each at most ``max_txt_len`` of them."""
        to_the_full = getattr(self.gated_fusion, "pool", None) == "all"
        ids, mask = self.pad(rows, self.config.max_txt_len if to_the_full else None)
        return self.lay_out(self.Qformer.bert.embeddings.word_embeddings(ids.to(self.device)), mask)

    def lay_out(self, words: Tensor, mask: Tensor) -> Text:
        """Word embeddings (B, M, C) and a CPU's (B, M) mask of what is no padding, as the calls take them."""
        num_queries = self.config.num_query_tokens
        return Text(
            words,
            mask.to(words.device, non_blocking=True),
            call_1=Layout.of(mask, num_queries, cls_first=False, words=words),
            call_2=Layout.of(mask, num_queries, cls_first=True, words=words),
            calls_2_and_4=Layout.of(mask.repeat(2, 1), num_queries, cls_first=True, words=words),
            alone=Layout.of(mask, 0, cls_first=True, words=words),
        )

    def fuse(self, reference_embeds: Tensor, text: Text) -> FusionOutput | None:
        """What the fusion makes of (B, N, D) reference tokens; None when fusion is off."""
        if self.gated_fusion is None:
            return None
        return self.gated_fusion(reference_embeds, self.words_for_fusion(text), text.mask)

    def words_for_fusion(self, text: Text) -> Tensor:
        """The words that the fusion reads, (B, M, C): word embeddings, each by itself.

        With ``fusion_text="contextual"`` they have been through the Q-Former's layers, without queries and
        image.
        """
        if self.config.fusion_text == "contextual":
            return self.words_in_context(text)
        return self.Qformer.bert.embeddings(text.words, 0)

    def words_in_context(self, text: Text) -> Tensor:
        """The words after the Q-Former's layers, without queries and image: (B, M, C), zeros at padding."""
        embedded = self.Qformer.bert.embeddings(text.words, 0)
        layout = text.alone
        return layout.pad(self.Qformer.bert(layout.rows(embedded[:, :0], embedded), layout))

    def compose(self, reference_embeds: Tensor | ImageKeys, text: Text, *, strength: float = 1.0) -> Tensor:
        """The query of each reference and text, f: (B, E), normalised. Fusion, call 1, call 2.

        ``strength`` scales the fusion's edit, fused - image: 1 is the model, 0 leaves the reference as it is.

        Training goes through the same methods as validation, `inference` and submission, so that the model
        that is scored is the model that was trained. With fusion off ``reference_embeds`` may be
        ``Qformer.bert.image_keys`` of them.
        """
        return self.query_of(self.prompts_of(reference_embeds, text, strength), text)

    def prompts_of(
        self, reference_embeds: Tensor | ScaledImage | ImageKeys, text: Text, strength: float = 1.0
    ) -> Tensor:
        """Fusion, then call 1: the sentence prompts (B, Q, C) of each reference and text."""
        tokens = cast(Tensor, reference_embeds)  # with fusion on they are nothing else
        fusion = self.fuse(tokens, text)
        if fusion is not None:
            if self.training:
                self.diagnostics = fusion_diagnostics(fusion, tokens, self.gated_fusion)
            reference_embeds = fusion.fused if strength == 1 else tokens.lerp(fusion.fused, strength)
        layout = text.call_1
        queries = self.Qformer.bert.embeddings(self.query_tokens.expand(layout.batch, -1, -1))
        rows = layout.rows(queries, self.Qformer.bert.embeddings(text.words, 0))
        return self.Qformer.bert(rows, layout, reference_embeds, wanted=layout.num_queries)

    def query_of(self, prompts: Tensor, text: Text) -> Tensor:
        """Call 2: sentence prompts (B, Q, C) and the text to the query f, (B, E), normalised."""
        return self._cls_features(*self._embed_call_2(prompts, text), text.call_2)

    def target_features(self, image_embeds: Tensor | ScaledImage | ImageKeys) -> Tensor:
        """Call 3: (B, N, D) image tokens, or ``Qformer.bert.image_keys`` of them, to features (B, Q, E)."""
        return F.normalize(self.vision_proj(self.read_image(image_embeds)), dim=-1)

    def read_image(self, image_embeds: Tensor | ScaledImage | ImageKeys) -> Tensor:
        """The queries' outputs of call 3, (B, Q, C)."""
        layout = Layout(batch_of(image_embeds), self.config.num_query_tokens)
        queries = self.Qformer.bert.embeddings(self.query_tokens.expand(layout.batch, -1, -1)).flatten(0, 1)
        return self.Qformer.bert(queries, layout, image_embeds).unflatten(0, (layout.batch, -1))

    def text_features(self, text: Text) -> Tensor:
        """Call 4: the text with the learned prompts alone to p (B, E), normalised."""
        return self._cls_features(*self._embed_call_4(text), text.call_2)

    def compose_and_text_features(self, prompts: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Calls 2 and 4 as one batch of 2 B: f and p, (B, E) each, normalised."""
        calls = zip(self._embed_call_2(prompts, text), self._embed_call_4(text))
        queries, words = (torch.cat(pair) for pair in calls)
        f, p = self._cls_features(queries, words, text.calls_2_and_4).chunk(2)
        return f, p

    def _embed_call_2(self, prompts: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C) without positions, and words (B, M, C)."""
        embed = self.Qformer.bert.embeddings
        return embed(prompts), embed(text.words, 0)

    def _embed_call_4(self, text: Text) -> tuple[Tensor, Tensor]:
        """The same of [CLS], Q prompts, other words, whose positions run over all of them."""
        embed = self.Qformer.bert.embeddings
        prompts = embed(self.prompt_tokens.expand(len(text.words), -1, -1), 1)
        return prompts, embed(text.words, 0, self.config.num_query_tokens + 1)

    def _cls_features(self, queries: Tensor, words: Tensor, layout: Layout) -> Tensor:
        """The layers of calls 2 and 4, without an image: (B, E) from the text's [CLS], normalised."""
        cls = self.Qformer.bert(layout.rows(queries, words), layout, wanted=1)[:, 0]
        return F.normalize(self.text_proj(cls), dim=-1)


@torch.no_grad()
def fusion_diagnostics(
    fusion: FusionOutput, reference_embeds: Tensor, module: nn.Module | None
) -> dict[str, Tensor]:
    """Scalars to log: gate mean and spread (standard deviation), alpha, and mean |fused - image|.

    They are taken in float32 in mixed precision too: a mean rounded to bfloat16 moves in steps of 0.002.
    """
    values = {}
    if fusion.gate is not None:
        gate = at_least_float32(fusion.gate)
        values["gate_mean"] = gate.mean()
        values["gate_std"] = gate.std()
    alpha = getattr(module, "alpha", None)
    if alpha is not None:
        values["alpha"] = alpha.detach().clone()
    values["mean_change"] = (at_least_float32(fusion.fused) - reference_embeds).abs().mean()
    return values
