"""LAVIS's door to the model: importing this module registers it as `blip2_cir_align_prompt`.

    import sprc.lavis_registration
    from lavis.models import load_model_and_preprocess
    model, vis_processors, txt_processors = load_model_and_preprocess("blip2_cir_align_prompt", "pretrain")

Where a class of that name is registered already, as in an SPRC checkout, ours takes its place, and a line
says so. Switches come from the YAML file that the environment variable ``SPRC_SWITCHES`` names.
The only module of this project that imports LAVIS. What it imports runs on Python 3.9 and torch 2.0, which is
SPRC's own environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lavis.common.dist_utils import download_cached_file
from lavis.common.registry import registry
from lavis.common.utils import is_url
from lavis.models import BaseModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor
from torch.nn import functional as F

from sprc.config import BACKBONES, MODEL_DIR, read_backbone, switches_from_environment
from sprc.errors import InputError
from sprc.models import blip2_qformer_cir_align_prompt as model_file
from sprc.models.device import halve_frozen_vit
from sprc.models.factory import create_model
from sprc.models.switches import FUSION, VIT, differences, mismatches, read_switches, vocabulary_digest

NAME = "blip2_cir_align_prompt"

# LAVIS's names for fields of ModelConfig.
LAVIS_FIELDS = {"num_query_token": "num_query_tokens", "cross_attention_freq": "cross_attention_every"}
# What LAVIS's configs may say besides, and the values that are this model's anyway.
LAVIS_SETTINGS: dict[str, tuple[Any, ...]] = {
    "arch": (NAME,),
    "vit_precision": ("fp16",),
    "drop_path_rate": (0,),
    "use_grad_checkpoint": (False,),
    "load_pretrained": (True,),
}
LAVIS_VITS = {"eva_clip_g": "pretrain", "clip_L": "pretrain_vitL"}

if (before := registry.mapping["model_name_mapping"].pop(NAME, None)) is not None:
    print(f"sprc: {NAME} was {before.__module__}.{before.__qualname__} and is now SPRC with gated fusion")


@registry.register_model(NAME)
class Blip2QformerCirAlignPrompt(model_file.Blip2QformerCirAlignPrompt, BaseModel):
    """Our model as one of LAVIS's: same name, so its checkpoints carry the same key."""

    # LAVIS joins these with its own folder; an absolute path survives that.
    PRETRAINED_MODEL_CONFIG_DICT = {name: str(MODEL_DIR / f"{name}.yaml") for name in BACKBONES}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, model_type: str) -> Blip2QformerCirAlignPrompt:
        """The model of a backbone."""
        return cls.build(model_type, {})

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Blip2QformerCirAlignPrompt:
        """The model of a LAVIS config, with the weights of its backbone, or of its checkpoint `finetuned`.

        `model_type`, or else `vit_model`, names the backbone. ``SPRC_SWITCHES`` goes over the config. What
        this model cannot follow raises :class:`InputError`.
        """
        values = {key: value for key, value in cfg.items() if value is not None}
        backbone = values.pop("model_type", None) or LAVIS_VITS.get(values.pop("vit_model", None))
        if backbone is None:
            raise InputError(
                f"the config has no model_type; give one of {', '.join(BACKBONES)}, or a vit_model of "
                f"{', '.join(LAVIS_VITS)}"
            )
        values.pop("vit_model", None)
        weights = read_backbone(backbone)["weights"]
        finetuned = values.pop("finetuned", "") if values.get("load_finetuned", True) else ""
        values = {key: value for key, value in values.items() if key not in ("finetuned", "load_finetuned")}
        settings = {**LAVIS_SETTINGS, "pretrained": (weights["blip2"],)}
        for name, known in settings.items():
            if (given := values.pop(name, known[0])) not in known:
                raise InputError(f"the config says {name}: {given}; this model has {known[0]}: leave it out")
        model = cls.build(backbone, {LAVIS_FIELDS.get(name, name): value for name, value in values.items()})
        if finetuned and finetuned != weights["blip2"]:
            model.load_checkpoint(finetuned)
        return model

    @classmethod
    def build(cls, backbone: str, values: dict[str, Any]) -> Blip2QformerCirAlignPrompt:
        """The model of a backbone with these fields of ``ModelConfig``, under those of ``SPRC_SWITCHES``."""
        model = create_model(cls, backbone, **{**values, **switches_from_environment()})
        halve_frozen_vit(model)  # on a CPU, load_model_and_preprocess turns all into float32 again
        print(f"sprc: {NAME}, backbone {backbone}, use_gated_fusion={model.config.use_gated_fusion}")
        return model

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *arguments: Any, **options: Any) -> Any:
        """As ``nn.Module``'s, but also with ``strict=False`` it refuses the state dict of another model.

        SPRC's scripts load with ``strict=False``, which leaves what the file lacks as random as it was. May
        lack: `position_ids`, which are constants, and the whole of a frozen vision transformer, which is the
        backbone's then. A plain checkpoint turns fusion off where no ``SPRC_SWITCHES`` is set.

        Raises:
            InputError: fusion on one side only, other switches, sizes or words, missing or unexpected
                entries. Where a line in the ``SPRC_SWITCHES`` file helps, the message gives it.
        """
        off = self.check_state(dict(state_dict))
        if off:
            self.gated_fusion = None
            self.config = replace(self.config, use_gated_fusion=False)
            print("sprc: the checkpoint is plain SPRC, so fusion is off: use_gated_fusion=False", flush=True)
        return super().load_state_dict(state_dict, *arguments, **options)

    def check_state(self, state: dict[str, Tensor]) -> bool:
        """Raise as :meth:`load_state_dict`; True where the state dict fits once fusion is off."""
        told, words = read_switches(state)
        others = differences(self.config, state)
        if "vocab_size" in others or words not in (None, vocabulary_digest(self.tokenizer)):
            raise InputError(
                f"the checkpoint's {others.get('vocab_size', self.config.vocab_size)} words are not the "
                f"model's {self.config.vocab_size}: it has another backbone, or words of its "
                "own; score it with the script that trained it"
            )
        off = others == {"use_gated_fusion": False} and not os.environ.get("SPRC_SWITCHES")
        if others and not off:
            lines = ", ".join(f"`{yaml.safe_dump({name: others[name]}).strip()}`" for name in sorted(others))
            kind = "SPRC with gated fusion" if any(key.startswith(FUSION) for key in state) else "plain SPRC"
            file = os.environ.get("SPRC_SWITCHES") or "a YAML file, named in the environment as SPRC_SWITCHES"
            raise InputError(f"the checkpoint is {kind}, and not as this model is; write {lines} into {file}")
        own = {key: v for key, v in self.state_dict().items() if not (off and key.startswith(FUSION))}
        vit = {key for key in own if key.startswith(VIT)}
        left_out = vit if self.config.freeze_vit and not vit & set(state) else set()
        if details := mismatches(own, state, left_out):
            raise InputError(f"the checkpoint holds parameters of another model than this one ({details})")
        if left_out:
            print("sprc: the checkpoint holds no vision transformer; the backbone's is used", flush=True)
        if self.config.use_gated_fusion and not off and not told:
            print(
                "sprc: the checkpoint does not say its fusion's switches; taken are "
                f"pool={self.config.pool}, fusion_text={self.config.fusion_text}",
                flush=True,
            )
        return off

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """Load a file of SPRC's or of LAVIS's scripts, or a bare state dict; returns what LAVIS's does.

        Raises :class:`InputError` for a file that is none of these, and as :meth:`load_state_dict`.
        """
        path = Path(
            download_cached_file(url_or_filename, check_hash=False, progress=True)
            if is_url(url_or_filename)
            else url_or_filename
        )
        if not path.is_file():
            raise InputError(f"{path} is missing; give the path or the address of a checkpoint")
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file comes out of the unpickler as almost any exception
            raise InputError(
                f"{path} cannot be loaded safely: it is no checkpoint, or holds more than tensors"
            ) from error
        for key in (type(self).__name__, "model"):
            if isinstance(contents, dict) and isinstance(contents.get(key), dict):
                contents = contents[key]
        if not isinstance(contents, dict) or not all(
            isinstance(value, Tensor) for value in contents.values()
        ):
            raise InputError(f"{path} holds neither {type(self).__name__} nor model, nor is it a state dict")
        return self.load_state_dict(contents, strict=False)

    def load_from_pretrained(self, url_or_filename: str, **_: Any) -> None:
        """LAVIS's loader of a backbone, which this model has when it is built: :class:`InputError`."""
        raise InputError(
            f"{url_or_filename}: the backbone's weights are loaded by from_pretrained and from_config; for a "
            "checkpoint call load_checkpoint"
        )

    def extract_target_features(self, image: Tensor, mode: str = "mean") -> tuple[Tensor, Tensor]:
        """As ours; SPRC's scripts pass a ``mode`` that its model does not use either."""
        return super().extract_target_features(image)

    @torch.no_grad()
    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """LAVIS's features of `image` (B, 3, S, S) and `text_input`, B captions.

        Args:
            samples: what the mode needs of the two.
            mode: "image": ``image_embeds`` (B, Q, C), ``image_embeds_proj`` (B, Q, E), of call 3; "text":
                ``text_embeds`` (B, M, C), ``text_embeds_proj`` (B, M, E), zeros at padding; "multimodal":
                ``multimodal_embeds`` (B, Q, C), the sentence prompts of call 1, with fusion where it is on.

        Raises:
            InputError: an unknown mode, or a sample that it needs is missing.
        """
        needs = {"image": ("image",), "text": ("text_input",), "multimodal": ("image", "text_input")}
        if mode not in needs:
            raise InputError(f"mode={mode!r} is unknown; choose from {', '.join(needs)}")
        if missing := [name for name in needs[mode] if samples.get(name) is None]:
            raise InputError(f"mode={mode!r} needs samples[{missing[0]!r}]")
        if mode == "image":
            outputs = self.read_image(self.encode_image(samples["image"]))
            return BlipOutputFeatures(
                image_embeds=outputs, image_embeds_proj=F.normalize(self.vision_proj(outputs), dim=-1)
            )
        text = self.tokenize(samples["text_input"])
        if mode == "text":
            outputs = self.words_in_context(text)
            projected = F.normalize(self.text_proj(outputs), dim=-1)
            mask = text.mask.to(self.device).unsqueeze(-1)
            return BlipOutputFeatures(text_embeds=outputs, text_embeds_proj=projected * mask)
        return BlipOutputFeatures(
            multimodal_embeds=self.prompts_of(self.encode_image(samples["image"]), text)
        )
