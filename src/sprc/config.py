"""The arguments of the model, as one validated dataclass. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sprc.errors import InputError
from sprc.settings import setting, settings_of

MODEL_DIR = Path(__file__).parent / "models"
BACKBONES = ("pretrain", "pretrain_vitL", "coco", "tiny")
VIT_KINDS = ("eva", "clip")
POOLS = ("masked", "all")
FUSION_STARTS = ("auto", "random", "identity")
FUSION_TEXTS = ("embeddings", "contextual")
AMP = ("auto", "off", "fp16", "bf16")  # mixed precision, see sprc.models.device.precision
CONTRASTS = ("infonce", "complementary")  # see sprc.models.losses
RERANKER = "blip2_cir_rerank"  # the model of the second stage, in --blip-model-name
GALLERY_DTYPES = ("float32", "float16")
CACHE_DTYPES = ("float16", "bfloat16", "float32")
FUSION = "fusion of the text into the reference's image tokens"  # the flags' group


class Strategy(NamedTuple):
    """What acts in a fusion strategy."""

    has_alpha: bool
    has_identity: bool  # fusion_start="identity"
    start: str = "random"  # its own, fusion_start="auto"
    pools: bool = True  # it reads the words' mean, so that pool matters
    contextual: bool = False  # it needs fusion_text="contextual", and gets it


# The strategies that models/gated_fusion.py knows, for those who want to know of them without torch.
STRATEGIES = {
    "gated": Strategy(has_alpha=True, has_identity=True),
    "additive": Strategy(has_alpha=True, has_identity=True),
    "weighted": Strategy(has_alpha=False, has_identity=True),
    "film": Strategy(has_alpha=False, has_identity=True),
    "tirg": Strategy(has_alpha=False, has_identity=True),
    "gmu": Strategy(has_alpha=False, has_identity=False),
    "cross": Strategy(has_alpha=True, has_identity=True, start="identity", pools=False),
    "select": Strategy(has_alpha=True, has_identity=True, start="identity", pools=False, contextual=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """Widths, depths and switches of ``Blip2QformerCirAlignPrompt``.

    The defaults are BLIP-2's first stage with ViT-g (spec of the `pretrain` backbone). What is declared as a
    :func:`setting` is a switch: scripts have a flag for it. A value that cannot work raises
    :class:`InputError` naming the argument and its value. What the strategy decides is what it decided, once
    the object is there: ``fusion_start`` is never "auto", and ``fusion_text`` of `select` is "contextual".
    """

    # Vision transformer: "eva" is EVA-CLIP's ViT-g layout, "clip" is OpenAI CLIP's.
    vit: str = "eva"
    image_size: int = setting(224, help="pixels, a multiple of the patch; default: the backbone's")
    patch_size: int = 14
    vit_width: int = 1408
    vit_depth: int = 39
    vit_heads: int = 16
    vit_mlp_ratio: float = 4.3637
    vit_norm_eps: float = 1e-6
    freeze_vit: bool = setting(True, help="default: the backbone's")
    vision_norm_eps: float = 1e-5  # ln_vision

    # Q-Former: a BERT with learned queries and cross-attention to the image.
    vocab_size: int = 30523  # bert-base-uncased and [DEC]
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_every: int = 2
    max_positions: int = 512
    norm_eps: float = 1e-12
    dropout: float = 0.1
    initializer_range: float = 0.02
    num_query_tokens: int = 32
    embed_dim: int = 256
    max_txt_len: int = 32

    # Fusion of the modification text into the reference's image tokens.
    use_gated_fusion: bool = setting(True, help="off is plain SPRC", group=FUSION)
    fusion_strategy: str = setting(
        "gated", metavar="NAME", help=", ".join(STRATEGIES).replace("gated", "gated (default)"), group=FUSION
    )
    alpha_init: float = setting(
        0.5, help="start of the learned strength, in strategies that have one; default: 0.5", group=FUSION
    )
    fusion_dropout: float = setting(0.1, help="default: 0.1", group=FUSION)
    pool: str = setting(
        "masked",
        choices=POOLS,
        help="the text's mean: without padding (masked, default) or with; cross and select take none",
        group=FUSION,
    )
    fusion_start: str = setting(
        "auto",
        choices=FUSION_STARTS,
        help="identity: step 0 is plain SPRC; gmu has none. auto (default): identity in cross and select, "
        "else random",
        group=FUSION,
    )
    fusion_text: str = setting(
        "embeddings",
        choices=FUSION_TEXTS,
        help="what is read: word embeddings (default), or these after the Q-Former's layers, as select does",
        group=FUSION,
    )
    fusion_width: int = setting(
        512, help="bottleneck of cross and select, at most the image's width; default: 512", group=FUSION
    )
    fusion_top_k: int = setting(
        8, help="how many image tokens select edits; default: the backbone's, 8 or tiny's 3", group=FUSION
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            # An int is fine where a float is asked; a bool is an int to Python but not to us.
            if kind is float and type(value) is int and abs(value) < 2**53:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise InputError(
                    f"{field.name}={value!r} has type {type(value).__name__}; give {kind.__name__}"
                )
            if kind is int and value < 1:
                raise InputError(f"{field.name}={value} must be at least 1")
        _one_of("vit", self.vit, VIT_KINDS)
        for field in settings_of(ModelConfig):
            if choices := field.metadata["flag"]["choices"]:
                _one_of(field.name, getattr(self, field.name), choices)
        strategy = STRATEGIES.get(self.fusion_strategy, STRATEGIES["gated"])  # the model refuses another
        if self.fusion_start == "auto":
            object.__setattr__(self, "fusion_start", strategy.start)
        if strategy.contextual:
            object.__setattr__(self, "fusion_text", "contextual")
        if strategy.pools and self.fusion_text == "contextual" and self.pool == "all":
            raise InputError("pool='all' averages padding as well, which fusion_text='contextual' has not")
        _divides("patch_size", self.patch_size, "image_size", self.image_size)
        _divides("vit_heads", self.vit_heads, "vit_width", self.vit_width)
        _divides("num_heads", self.num_heads, "hidden_size", self.hidden_size)
        for name in ("dropout", "fusion_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("vit_norm_eps", "vision_norm_eps", "norm_eps", "initializer_range", "vit_mlp_ratio"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)} must be a finite number above 0")
        if not abs(self.alpha_init) < float("inf"):
            raise InputError(f"alpha_init={self.alpha_init} must be a finite number")
        if self.num_query_tokens + self.max_txt_len > self.max_positions:
            raise InputError(
                f"max_positions={self.max_positions} is less than num_query_tokens + max_txt_len "
                f"= {self.num_query_tokens + self.max_txt_len}, the length of the text-only call"
            )

    @property
    def num_patches(self) -> int:
        """Patches on one side of the grid; the image has ``num_patches ** 2`` and one [CLS]."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> ModelConfig:
        """Build from a YAML's or a checkpoint's values; an unknown key raises :class:`InputError`."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            raise InputError(f"{source}: unknown model argument {', '.join(unknown)}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


MODEL_SWITCHES = tuple(field.name for field in settings_of(ModelConfig))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")


def _divides(name: str, divisor: int, of_name: str, value: int) -> None:
    if value % divisor:
        raise InputError(f"{of_name}={value} is not a multiple of {name}={divisor}")


def read_backbone(name: str) -> dict[str, Any]:
    """Read ``models/{name}.yaml``; its keys are `model`, `weights` and `preprocess`.

    Raises :class:`InputError` for a name that is not in ``BACKBONES``.
    """
    _one_of("--backbone", name, BACKBONES)
    return yaml.safe_load((MODEL_DIR / f"{name}.yaml").read_text(encoding="utf-8"))


def switches_from_environment() -> dict[str, Any]:
    """Fields of :class:`ModelConfig` from the YAML file that ``SPRC_SWITCHES`` names, if it is set.

    For scripts that are not ours and cannot pass our flags. Raises :class:`InputError` for a file that
    cannot be read or names an unknown field.
    """
    path = os.environ.get("SPRC_SWITCHES")
    if not path:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"SPRC_SWITCHES={path} cannot be read ({reason}); give a YAML file") from error
    known = {field.name for field in fields(ModelConfig)}
    if not isinstance(values, dict) or (unknown := sorted(map(str, set(values) - known))):
        wrong = ", ".join(unknown) if isinstance(values, dict) else "no mapping"
        raise InputError(f"SPRC_SWITCHES={path}: {wrong}; give lines such as `use_gated_fusion: false`")
    return values
