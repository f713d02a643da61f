"""The published ways, in our own words: SPRC's four calls on LAVIS's Q-Former, and CIR's ranking."""

import importlib.util
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.losses import align_loss, contrastive_loss

HAS_LAVIS = importlib.util.find_spec("lavis") is not None
NO_LAVIS = "LAVIS is not installed here"


class LavisStep(nn.Module):
    """What plain SPRC trains, with LAVIS's own Q-Former and with the weights of ``model`` (without fusion).

    LAVIS has no calls 2 and 4. SPRC changes its Q-Former for them; here LAVIS's layers are told that there
    are no queries, so that all tokens are text, which gives the same. Captions are padded to ``max_txt_len``.
    All but the Q-Former (``ln_vision``, projections, losses) is ours, on both sides of a comparison.
    """

    def __init__(self, model: Blip2QformerCirAlignPrompt) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that LAVIS uses
            from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
        config = model.config
        qformer = BertLMHeadModel(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_positions,
                layer_norm_eps=config.norm_eps,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                encoder_width=config.vit_width,
                add_cross_attention=True,
                cross_attention_freq=config.cross_attention_every,
                query_length=config.num_query_tokens,
            )
        )
        # The same memory under both, so that neither side has fresher weights in the cache.
        qformer.load_state_dict(model.Qformer.state_dict(), strict=True, assign=True)
        self.bert = qformer.bert
        self.model = model
        self.train()

    def forward(self, samples: dict[str, Tensor | list[str]]) -> dict[str, Tensor]:
        """(B, N, D) tokens of `image` and `target`, and B captions `text_input`, to SPRC's losses."""
        model, bert = self.model, self.bert
        reference, target = model.normalise(samples["image"]), model.normalise(samples["target"])
        ids = torch.full((len(reference), model.config.max_txt_len), model.tokenizer.pad_token_id)
        for row, caption in zip(ids, samples["text_input"], strict=True):
            known = model.caption_ids[caption]
            row[: len(known)] = torch.tensor(known)
        ids = ids.to(reference.device)
        words = (ids != model.tokenizer.pad_token_id).long()
        queries = model.query_tokens.expand(len(reference), -1, -1)
        num_queries = queries.shape[1]
        mask = torch.cat([words.new_ones(queries.shape[:2]), words], dim=1)
        seen = mask.new_ones(reference.shape[:2])

        fused = bert(
            ids,
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=reference,
            encoder_attention_mask=seen,
        ).last_hidden_state
        prompts = fused[:, :num_queries]
        composed = self.as_text(bert.embeddings(ids, query_embeds=prompts), mask)
        targets = bert(
            query_embeds=queries, encoder_hidden_states=target, encoder_attention_mask=seen
        ).last_hidden_state
        alone = self.as_text(self.embed_text_alone(ids), mask)

        query_feats = F.normalize(model.text_proj(composed[:, num_queries]), dim=-1)
        target_feats = F.normalize(model.vision_proj(targets), dim=-1)
        text_feats = F.normalize(model.text_proj(alone[:, 0]), dim=-1)
        return {
            "loss_itc": contrastive_loss(query_feats, target_feats, model.temp),
            "loss_rtc": contrastive_loss(text_feats, target_feats, model.temp),
            "loss_align": align_loss(prompts, model.prompt_tokens),
        }

    def embed_text_alone(self, ids: Tensor) -> Tensor:
        """[CLS], the prompts, the other words, with positions over all of them: (B, Q + M, C)."""
        embeddings = self.bert.embeddings
        words = embeddings.word_embeddings(ids)
        prompts = self.model.prompt_tokens.expand(len(ids), -1, -1)
        tokens = torch.cat([words[:, :1], prompts, words[:, 1:]], dim=1)
        tokens = tokens + embeddings.position_embeddings.weight[: tokens.shape[1]]
        return embeddings.dropout(embeddings.LayerNorm(tokens))

    def as_text(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """LAVIS's layers on (B, L, C) tokens that are all text, under a (B, L) mask."""
        bert = self.bert
        additive = bert.get_extended_attention_mask(mask, mask.shape, mask.device, False)
        layers = bert.encoder(embedded, additive, head_mask=[None] * bert.config.num_hidden_layers)
        return layers.last_hidden_state


def published_ranking(
    queries: Tensor,
    gallery: Tensor,
    names: np.ndarray,
    references: np.ndarray,
    targets: np.ndarray,
    members: np.ndarray,
) -> dict[str, float]:
    """CIRR's seven recalls as CIR code commonly gets them: everything sorted, and compared by name.

    Shapes: queries (T, E), gallery (G, Q, E), and arrays of names: (G,), (T,), (T,), and members (T, K),
    the reference left out.
    """
    products = torch.einsum("te,gqe->tgq", queries, gallery.to(queries.dtype))  # (T, G, Q)
    similarities = products.max(dim=-1).values
    order = torch.argsort(1 - similarities, dim=-1).cpu().numpy()
    ranked = names[order]  # (T, G)
    kept = ranked != references[:, None]
    ranked = ranked[kept].reshape(len(ranked), -1)
    labels = ranked == targets[:, None]
    in_set = (ranked[:, :, None] == members[:, None, :]).any(axis=-1)
    set_labels = labels[in_set].reshape(len(ranked), -1)
    found = {f"recall_at{k}": labels[:, :k].any(axis=1) for k in (1, 5, 10, 50)}
    found |= {f"group_recall_at{k}": set_labels[:, :k].any(axis=1) for k in (1, 2, 3)}
    return {name: 100 * float(hits.mean()) for name, hits in found.items()}
