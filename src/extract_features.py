"""Fill a feature cache ahead of training and scoring: the frozen vision transformer's tokens, once an image.

    python src/extract_features.py --dataset CIRR --backbone pretrain --feature-cache DIR
    python src/blip_fine_tune_2.py --dataset CIRR --backbone pretrain --feature-cache DIR ...
At ViT-g an image takes 0.72 MB in float16. Training and scoring fill what is missing themselves; what is
there is only verified, and a killed filling goes on where it was.
"""

from sprc.config import ModelConfig
from sprc.errors import run_script
from sprc.scoring.settings import ExtractionSettings
from sprc.settings import add_flags, flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    parser = flag_parser(__doc__, ExtractionSettings)
    add_flags(parser, ModelConfig, ("image_size", "freeze_vit"), may_be_unset=True)
    settings = ExtractionSettings.of_flags(given_flags(parser))
    from sprc.distributed import process_group
    from sprc.scoring.feature_extraction import extract_features

    with process_group(settings.timeout):
        extract_features(settings)


if __name__ == "__main__":
    run_script(main)
