"""LAVIS's door to the model: importing this module registers it as `blip2_cir_align_prompt`.

    import sprc.lavis_registration
    from lavis.models import load_model_and_preprocess
    model, vis_processors, txt_processors = load_model_and_preprocess("blip2_cir_align_prompt", "pretrain")

Where a class of that name is registered already, as in an SPRC checkout, ours takes its place, and a line
says so. Switches come from the YAML file that the environment variable ``SPRC_SWITCHES`` names.
The only module of this project that imports LAVIS.
"""

from lavis.common.registry import registry
from lavis.models import BaseModel
from torch import Tensor

from sprc.config import BACKBONES, MODEL_DIR, switches_from_environment
from sprc.data.scenes import caption_words
from sprc.models import blip2_qformer_cir_align_prompt as model_file
from sprc.models.device import halve_frozen_vit
from sprc.models.factory import create_model

NAME = "blip2_cir_align_prompt"

if (before := registry.mapping["model_name_mapping"].pop(NAME, None)) is not None:
    print(f"sprc: {NAME} was {before.__module__}.{before.__qualname__} and is now SPRC with gated fusion")


@registry.register_model(NAME)
class Blip2QformerCirAlignPrompt(model_file.Blip2QformerCirAlignPrompt, BaseModel):
    """Our model as one of LAVIS's: same name, so its checkpoints carry the same key."""

    # LAVIS joins these with its own folder; an absolute path survives that.
    PRETRAINED_MODEL_CONFIG_DICT = {name: str(MODEL_DIR / f"{name}.yaml") for name in BACKBONES}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, model_type: str) -> "Blip2QformerCirAlignPrompt":
        """The model of a backbone; without data at hand, `tiny` takes the built-in benchmark's words."""
        model = create_model(cls, model_type, captions=caption_words(), **switches_from_environment())
        halve_frozen_vit(model)  # on a CPU, load_model_and_preprocess turns all into float32 again
        print(f"sprc: {NAME}, backbone {model_type}, use_gated_fusion={model.config.use_gated_fusion}")
        return model

    def extract_target_features(self, image: Tensor, mode: str = "mean") -> tuple[Tensor, Tensor]:
        """As ours; SPRC's scripts pass a ``mode`` that its model does not use either."""
        return super().extract_target_features(image)
