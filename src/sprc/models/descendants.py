"""Published models that descend from SPRC, and compute a query with parameters or calls of their own.

    SPRC        call 1 on queries, text, reference; call 2 on what it gives                one Q-Former
    SPN4CIR     the same, and call 2 by a second Q-Former and projection, which alone were trained further
                on a bank of targets: `Qformer_query.*`, `text_proj_q.*`
    TME         no call 1: call 2 reads the reference as call 3 gives it, as a target is. `d2t_proj.*` acts on
                differences of images, in its training alone

Their targets are SPRC's: call 3. So each is a class with SPRC's methods, which score and search as SPRC's do.
They are not trained here: what made them is not built.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprc.config import ModelConfig, read_backbone
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, Text
from sprc.models.published import Published
from sprc.models.qformer import ImageKeys, ScaledImage
from sprc.models.tokenizer import SPECIAL_TOKENS, WordPiece

STATE = Blip2QformerCirAlignPrompt.__name__
SPN4CIR, TME = "Qformer_query.", "d2t_proj."  # parameters that each has and no other model
SPN4CIR_PREFIX = "blip_model."  # of all names in its files


class Spn4cir(Blip2QformerCirAlignPrompt):
    """SPRC with a second Q-Former for call 2, words included, after SPN4CIR's code."""

    def __init__(self, config: ModelConfig, tokenizer: WordPiece) -> None:
        super().__init__(config, tokenizer)
        self.Qformer_query = copy.deepcopy(self.Qformer)
        self.text_proj_q = nn.Linear(config.hidden_size, config.embed_dim)
        self.train()

    def look_up(self, rows: list[list[int]]) -> Text:
        """The captions as both Q-Formers read them."""
        text = super().look_up(rows)
        ids, _ = self.pad(rows, text.words.shape[1])
        words = self.Qformer_query.bert.embeddings.word_embeddings(ids.to(self.device))
        return text._replace(words_of_call_2=words)

    def query_of(self, prompts: Tensor, text: Text) -> Tensor:
        """Call 2, by its own Q-Former: (B, E), normalised."""
        bert = self.Qformer_query.bert
        assert text.words_of_call_2 is not None
        rows = text.call_2.rows(bert.embeddings(prompts), bert.embeddings(text.words_of_call_2, 0))
        return F.normalize(self.text_proj_q(bert(rows, text.call_2, wanted=1)[:, 0]), dim=-1)


class Tme(Blip2QformerCirAlignPrompt):
    """SPRC without call 1, after TME's code."""

    def __init__(self, config: ModelConfig, tokenizer: WordPiece) -> None:
        super().__init__(config, tokenizer)
        self.d2t_proj = nn.Linear(config.vit_width, config.vit_width)
        self.train()

    def prompts_of(
        self, reference_embeds: Tensor | ScaledImage | ImageKeys, text: Text, strength: float = 1.0
    ) -> Tensor:
        """The reference as call 3 gives it: (B, Q, C). The text comes in with call 2."""
        return self.read_image(reference_embeds)


# By the kind that the registry names. "sprc" is a model of ours, too, with fusion or without.
CLASSES: dict[str, type[Blip2QformerCirAlignPrompt]] = {
    "sprc": Blip2QformerCirAlignPrompt,
    "spn4cir": Spn4cir,
    "tme": Tme,
}
TITLES = {"spn4cir": "SPN4CIR's second stage on SPRC", "tme": "TME"}
# What of a descendant's own is used, and what is not.
OWN = {
    "spn4cir": "Qformer_query.* and text_proj_q.*, its own, compute call 2",
    "tme": "d2t_proj.*, its own, acts in its training alone and is kept, and call 1 is none of its",
}


def kind_of(state: Mapping[str, Tensor]) -> str:
    """Whose state dict it is, by the names that it alone has: a key of ``CLASSES``."""
    if any(name.startswith(SPN4CIR) for name in state):
        return "spn4cir"
    return "tme" if any(name.startswith(TME) for name in state) else "sprc"


def as_sprc_s(contents: dict[str, Any]) -> dict[str, Any]:
    """A descendant's file in SPRC's form: `epoch`, None where it does not say it, and the state dict.

    SPN4CIR's has the entry `state_dict`, whose names have a prefix; one that has not keeps its name, and is
    refused later as one too many. TME's is a state dict alone. Any other is returned as it is.
    """
    state = contents.get("state_dict")
    if STATE not in contents and isinstance(state, dict) and any(SPN4CIR in str(name) for name in state):
        plain = {str(name).removeprefix(SPN4CIR_PREFIX): value for name, value in state.items()}
        return {"epoch": contents.get("epoch"), STATE: plain}
    if f"{TME}weight" in contents:
        return {"epoch": None, STATE: contents}
    return contents


def parameters_of(published: Published) -> dict[str, torch.Size]:
    """The names of a published checkpoint's parameters, and their shapes, as the classes here have them.

    `position_ids`, constants, may be missing in its file.
    """
    values = {**read_backbone(published.backbone)["model"], "use_gated_fusion": False}
    config = ModelConfig.from_dict(values, f"backbone {published.backbone}")
    with torch.device("meta"):
        # Only the number of the words has a part in the shapes.
        model = CLASSES[published.kind](config, WordPiece(SPECIAL_TOKENS))
    return {name: value.shape for name, value in model.state_dict().items()}
