"""LAVIS's door to the model: importing this module registers it as `blip2_cir_align_prompt`.

    import sprc.lavis_registration
    from lavis.models import load_model_and_preprocess
    model, vis_processors, txt_processors = load_model_and_preprocess("blip2_cir_align_prompt", "pretrain")

The only module of this project that imports LAVIS.
"""

from lavis.common.registry import registry
from lavis.models import BaseModel

from sprc.config import BACKBONES, MODEL_DIR
from sprc.data.scenes import caption_words
from sprc.models import blip2_qformer_cir_align_prompt as model_file
from sprc.models.factory import create_model


@registry.register_model("blip2_cir_align_prompt")
class Blip2QformerCirAlignPrompt(model_file.Blip2QformerCirAlignPrompt, BaseModel):
    """Our model as one of LAVIS's: same name, so its checkpoints carry the same key."""

    # LAVIS joins these with its own folder; an absolute path survives that.
    PRETRAINED_MODEL_CONFIG_DICT = {name: str(MODEL_DIR / f"{name}.yaml") for name in BACKBONES}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, model_type: str) -> "Blip2QformerCirAlignPrompt":
        """The model of a backbone; without data at hand, `tiny` takes the built-in benchmark's words."""
        return create_model(cls, model_type, captions=caption_words())
