"""SPRC (Sentence-level Prompts Benefit Composed Image Retrieval, ICLR 2024) with gated fusion.

One Q-Former, called in four ways. B batch, Q = 32 queries, M = 32 text tokens, N image tokens,
D image width, C = 768 hidden width, E = 256 embedding width:

    1. fusion           queries + text, reference image  ->  (B, Q + M, C), the first Q are the prompt
    2. sentence prompt  prompt + text, no image          ->  f = text_proj(output[:, Q]), (B, E)
    3. target           queries, target image            ->  T = vision_proj(output), (B, Q, E)
    4. text only        [CLS], prompts, words, no image  ->  p = text_proj(output[:, 0]), (B, E)

With ``use_gated_fusion`` the text edits the reference's image tokens before call 1; the target's tokens
are never edited. Without it the model is plain SPRC and has no fusion parameter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding, BertTokenizer

from sprc.config import ModelConfig
from sprc.losses import align_loss, contrastive_loss, similarity
from sprc.models.gated_fusion import FusionOutput, fusion_class
from sprc.models.qformer import QFormer
from sprc.models.vision import ClipViT, EvaViT


class Blip2QformerCirAlignPrompt(nn.Module):
    """The model `blip2_cir_align_prompt`. Parameter names are LAVIS's and SPRC's checkpoint format.

    Args:
        config: widths, depths, epsilons and switches.
        tokenizer: a BERT tokenizer of ``config.vocab_size`` entries.
    """

    def __init__(self, config: ModelConfig, tokenizer: BertTokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer

        self.visual_encoder = self.vision_transformer(config)
        self.ln_vision = nn.LayerNorm(config.vit_width, eps=config.vision_norm_eps)

        self.Qformer = QFormer(
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
            initializer_range=config.initializer_range,
        )
        token_shape = (1, config.num_query_tokens, config.hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(token_shape).normal_(std=config.initializer_range))
        self.prompt_tokens = nn.Parameter(torch.empty(token_shape).normal_(std=config.initializer_range))
        self.vision_proj = nn.Linear(config.hidden_size, config.embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

        # Built last, so that one seed gives the same other weights with fusion and without.
        self.gated_fusion = None
        if config.use_gated_fusion:
            self.gated_fusion = fusion_class(config.fusion_strategy)(
                config.vit_width,
                config.hidden_size,
                dropout=config.fusion_dropout,
                alpha_init=config.alpha_init,
                pool=config.pool,
                start=config.fusion_start,
            )
        self.diagnostics: dict[str, Tensor] = {}

        # No loss of this model reaches BLIP-2's matching and language heads; they stay for the
        # checkpoint format. (The language head's word matrix is tied to the embeddings and is trained.)
        self.itm_head.requires_grad_(False)
        for name, parameter in self.Qformer.cls.named_parameters():
            parameter.requires_grad_(name == "predictions.decoder.weight")
        self.visual_encoder.requires_grad_(not config.freeze_vit)
        self.train()

    @staticmethod
    def vision_transformer(config: ModelConfig) -> EvaViT | ClipViT:
        """The image encoder that ``config`` describes, with random weights."""
        arguments = {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vit_width,
            "depth": config.vit_depth,
            "heads": config.vit_heads,
            "mlp_ratio": config.vit_mlp_ratio,
            "norm_eps": config.vit_norm_eps,
        }
        if config.vit == "eva":
            return EvaViT(**arguments, initializer_range=config.initializer_range)
        return ClipViT(**arguments)

    def train(self, mode: bool = True) -> "Blip2QformerCirAlignPrompt":
        """Set the mode; a frozen vision transformer stays in eval mode always."""
        super().train(mode)
        if self.config.freeze_vit:
            self.visual_encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.query_tokens.device

    def forward(self, samples: dict[str, Tensor | list[str]]) -> dict[str, Tensor]:
        """The losses of a batch of triplets.

        Args:
            samples: `image` (B, 3, S, S) references, `target` (B, 3, S, S), `text_input` B captions.

        Returns:
            `loss_itc`, `loss_rtc`, `loss_align`: unweighted scalars.
        """
        text = self.tokenize(samples["text_input"])
        images = torch.cat([samples["image"], samples["target"]])  # one pass through the ViT for both
        reference_embeds, target_embeds = self.encode_image(images).chunk(2)
        query_feats, fusion_outputs = self.compose(reference_embeds, text)
        target_feats = self.target_features(target_embeds)
        return {
            "loss_itc": contrastive_loss(query_feats, target_feats, self.temp),
            "loss_rtc": contrastive_loss(self.text_features(text), target_feats, self.temp),
            "loss_align": align_loss(fusion_outputs, self.prompt_tokens),
        }

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
        query_feats, _ = self.compose(reference_embeds, self.tokenize(text))
        return similarity(query_feats, target_feats)

    @torch.no_grad()
    def extract_target_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) images to their features as targets (B, Q, E) and tokens as references (B, N, D)."""
        image_embeds = self.encode_image(image)
        return self.target_features(image_embeds), image_embeds

    def tokenize(self, text: list[str]) -> BatchEncoding:
        """B captions to `input_ids` and `attention_mask`, (B, M) each, padded and cut to ``max_txt_len``."""
        return self.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=self.config.max_txt_len,
            return_tensors="pt",
        ).to(self.device)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to normalised image tokens (B, N, D). No graph through a frozen ViT.

        On a GPU a frozen ViT runs in float16, as in LAVIS, whatever the precision around it.
        """
        if self.config.freeze_vit:
            on_gpu = image.device.type == "cuda"
            with torch.no_grad(), torch.autocast(image.device.type, torch.float16, enabled=on_gpu):
                tokens = self.visual_encoder(image)
        else:
            tokens = self.visual_encoder(image)
        return self.ln_vision(tokens.float())

    def fuse(self, reference_embeds: Tensor, text: BatchEncoding) -> FusionOutput | None:
        """What the fusion makes of (B, N, D) reference tokens; None when fusion is off."""
        if self.gated_fusion is None:
            return None
        text_embeds = self.Qformer.bert.embeddings(text.input_ids)  # (B, M, C)
        return self.gated_fusion(reference_embeds, text_embeds, text.attention_mask)

    def compose(self, reference_embeds: Tensor, text: BatchEncoding) -> tuple[Tensor, Tensor]:
        """The one way from a reference and a text to a query: fusion, call 1, call 2.

        Training, validation, `inference` and submission all go through here, so that the model that is
        scored is the model that was trained.

        Returns:
            f (B, E), normalised, and the fusion call's query outputs (B, Q, C).
        """
        fusion = self.fuse(reference_embeds, text)
        if fusion is not None:
            if self.training:
                self.diagnostics = fusion_diagnostics(fusion, reference_embeds, self.gated_fusion)
            reference_embeds = fusion.fused
        queries = self.query_tokens.expand(len(reference_embeds), -1, -1)
        num_queries = queries.shape[1]
        mask = self._mask_with_queries(text)
        bert = self.Qformer.bert
        outputs = bert(text.input_ids, queries, mask, reference_embeds)[:, :num_queries]
        sentence = bert(text.input_ids, outputs, mask)
        return F.normalize(self.text_proj(sentence[:, num_queries]), dim=-1), outputs

    def target_features(self, image_embeds: Tensor) -> Tensor:
        """Call 3: (B, N, D) image tokens to normalised target features (B, Q, E)."""
        queries = self.query_tokens.expand(len(image_embeds), -1, -1)
        outputs = self.Qformer.bert(query_embeds=queries, encoder_hidden_states=image_embeds)
        return F.normalize(self.vision_proj(outputs), dim=-1)

    def text_features(self, text: BatchEncoding) -> Tensor:
        """Call 4: the text with the learned prompts alone to p (B, E), normalised."""
        prompts = self.prompt_tokens.expand(len(text.input_ids), -1, -1)
        outputs = self.Qformer.bert(text.input_ids, prompts, self._mask_with_queries(text), no_img=True)
        return F.normalize(self.text_proj(outputs[:, 0]), dim=-1)

    def _mask_with_queries(self, text: BatchEncoding) -> Tensor:
        """(B, Q + M): the queries are always seen, the text's padding never.

        It also fits call 4, where [CLS] comes before the queries: [CLS] is always seen, too.
        """
        ones = text.attention_mask.new_ones(len(text.attention_mask), self.config.num_query_tokens)
        return torch.cat([ones, text.attention_mask], dim=1)


@torch.no_grad()
def fusion_diagnostics(
    fusion: FusionOutput, reference_embeds: Tensor, module: nn.Module
) -> dict[str, Tensor]:
    """Scalars to log: gate mean and spread (standard deviation), alpha, and mean |fused - image|."""
    values = {}
    if fusion.gate is not None:
        values["gate_mean"] = fusion.gate.mean()
        values["gate_std"] = fusion.gate.std()
    if hasattr(module, "alpha"):
        values["alpha"] = module.alpha.detach().clone()
    values["mean_change"] = (fusion.fused - reference_embeds).abs().mean()
    return values
