"""Checkpoints: SPRC's two entries, `epoch` and the state dict, and what is needed to rebuild the model.

A published SPRC checkpoint has the two entries alone, and so has one that SPRC's own scripts save; they load
too, their backbone named on the command line. So do a saved model's folder, and files of SPRC's descendants.
Ours leave out a frozen vision transformer, which the backbone provides, and hold its fingerprint instead.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sprc.config import RERANKER, ModelConfig, read_backbone, switches_from_environment
from sprc.errors import InputError
from sprc.files import verify_archive, write_atomically
from sprc.models.blip2_qformer import Blip2Qformer
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.descendants import CLASSES, OWN, TITLES, as_sprc_s, kind_of
from sprc.models.factory import M, backbone_weights, create_model, model_class, tokenizer_of
from sprc.models.hub_folder import Saved, read_folder
from sprc.models.model_card import facts_of
from sprc.models.model_path import find_model
from sprc.models.published import published_in
from sprc.models.switches import FUSION, SWITCHES, VIT, mismatches, read_switches, sizes_of, vocabulary_digest
from sprc.models.tokenizer import SPECIAL_TOKENS, WordPiece, read_bert_vocabulary
from sprc.models.weights import weights_path

# Of frozen vision transformers, which do not change while they live: hashing 2 GB takes seconds.
FINGERPRINTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
STATE = Blip2QformerCirAlignPrompt.__name__


class Source(NamedTuple):
    """Where a checkpoint was read."""

    path: Path
    vit_is_backbone_s: bool  # its vision transformer was taken from the backbone's files
    run: dict[str, Any]  # what a saved model's config says of its run
    called: dict[str, Any]  # `blip_model_name` and `backbone`, which a published file does not say


class Checkpoint(NamedTuple):
    """A loaded checkpoint: the model in eval mode on the CPU, and what the run was told."""

    model: Blip2QformerCirAlignPrompt
    epoch: int | None  # None where the file does not say it
    hyperparameters: dict[str, Any]  # empty for a published checkpoint
    found: str  # one line for the user: what the file holds
    source: Source

    def told(self) -> list[str]:
        """Lines for the user: what the file holds, and what its training left out."""
        lines = [self.found]
        for title, left_out in self.hyperparameters.get("left_out", {}).items():
            if title.startswith("train") and left_out["images"]:
                lines.append(
                    f"its training left {left_out['images']:,} images without a file and "
                    f"{left_out['triplets']:,} triplets of {title} out"
                )
        return lines


def save_checkpoint(
    path: Path,
    model: Blip2Qformer,
    epoch: int,
    hyperparameters: dict[str, Any],
    *,
    full: bool = False,
) -> None:
    """Write the model with all that rebuilds it: config, vocabulary and the run's hyperparameters.

    A frozen vision transformer, which the backbone's files hold, is left out, unless ``full``; ``left_out``
    in the file says so.
    """
    contents = contents_of(model, epoch, hyperparameters, full=full)
    write_atomically(path, lambda file: torch.save(contents, file))


def contents_of(
    model: Blip2Qformer, epoch: int | None, hyperparameters: dict[str, Any], *, full: bool = False
) -> dict[str, Any]:
    """What a checkpoint of the model holds, see :func:`save_checkpoint`."""
    tokenizer = model.tokenizer
    state = model.state_dict()
    left_out = None
    if model.config.freeze_vit and not full:
        vit = {key: value for key, value in state.items() if key.startswith(VIT)}
        state = {key: value for key, value in state.items() if key not in vit}
        encoder = model.visual_encoder
        if encoder not in FINGERPRINTS:
            FINGERPRINTS[encoder] = fingerprint(vit)
        left_out = {"backbone": hyperparameters["backbone"], "fingerprint": FINGERPRINTS[encoder]}
    return {
        "epoch": epoch,
        STATE: state,
        "model_config": asdict(model.config),
        "vocabulary": tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size))),
        "hyperparameters": hyperparameters,
        "left_out": left_out,
    }


def saved_of(
    model: Blip2Qformer, epoch: int | None, told: dict[str, Any], source: Source, *, full: bool
) -> Saved:
    """What a folder keeps of a loaded model; ``told`` are its hyperparameters, and its preprocessing.

    Raises :class:`InputError` where a vision transformer is to be left out that is not the backbone's.
    """
    contents = contents_of(model, epoch, {**source.called, **told}, full=full)
    if contents["left_out"] is not None and not source.vit_is_backbone_s:
        try:
            vit_of_backbone(model.config, contents["left_out"], source.path)
        except InputError as error:
            raise InputError(
                f"the vision transformer of {source.path} cannot be left out: {error}; --save-full "
                "(save_full=True) keeps it in the file"
            ) from error
    run = source.run or facts_of(source.path, epoch)
    return Saved(contents, STATE, run, holds(model.config, contents[STATE], source), source.path)


def holds(config: ModelConfig, state: Mapping[str, Tensor], source: Source) -> str:
    """What kind of model a state dict is of, in words."""
    if source.called["blip_model_name"] == RERANKER:
        return "a re-ranker behind SPRC"
    return title_of(kind_of(state), config.use_gated_fusion)


def title_of(kind: str, has_fusion: bool) -> str:
    """A model of a kind of :data:`sprc.models.descendants.CLASSES`, in words."""
    return TITLES.get(kind) or ("SPRC with gated fusion" if has_fusion else "plain SPRC")


def load_checkpoint(
    path: Path,
    *,
    model_name: str | None = None,
    backbone: str | None = None,
    vocab: Path | None = None,
    switches: dict | None = None,
    contents: dict[str, Any] | None = None,
) -> Checkpoint:
    """Rebuild the model of a checkpoint, ours or a published one.

    Args:
        path: the file, or what else :func:`sprc.models.model_path.find_model` takes.
        model_name: what the user says it holds; checked against a file of ours.
        backbone: likewise; a published file needs it, unless it has the name that the registry gives it.
        vocab: BERT's `vocab.txt` for a published file, see :func:`sprc.models.tokenizer.bert_tokenizer`. A
            file of ours carries its vocabulary, and this must be the same.
        switches: None to score the model as it is. To start a training: fields of :class:`ModelConfig`
            that the user sets; a fusion that the file does not hold is newly started.
        contents: what :func:`read_contents` has read of the file at ``path`` already.

    Raises:
        InputError: the file is missing, is no checkpoint, is cut short, holds a pickle payload, is one of
            another model or backbone, or lacks parameters or has some too many (they are listed).
    """
    if contents is None:
        path = find_model(path)
        contents = read_contents(path)
    hyperparameters = contents.get("hyperparameters", {})
    published = None if "model_config" in contents else published_in(path)
    by_its_name = None if published is None else published.backbone
    for flag, given, own in (
        ("--blip-model-name", model_name, hyperparameters.get("blip_model_name")),
        ("--backbone", backbone, hyperparameters.get("backbone", by_its_name)),
    ):
        if given and own and given != own:
            raise InputError(f"{flag} {given!r}, but {path} says {own!r}; leave the flag out or give {own}")
    backbone = backbone or by_its_name
    if "model_config" in contents:
        backbone = hyperparameters["backbone"]
        values, tokenizer = contents["model_config"], read_vocabulary(contents["vocabulary"], path)
        if vocab is not None and read_bert_vocabulary(vocab) != contents["vocabulary"]:
            raise InputError(f"--vocab {vocab}: {path} carries another vocabulary; leave the flag out")
    elif backbone is None:
        raise InputError(f"{path} does not say which backbone it was trained on; pass --backbone")
    else:
        values, tokenizer = described_by_state(contents[STATE], backbone, path, vocab)

    state = contents[STATE]
    usual = read_backbone(backbone)["model"].get("vit_depth", ModelConfig.vit_depth)
    has_fusion = any(key.startswith(FUSION) for key in state)
    if switches is None:
        arguments = {**values, "use_gated_fusion": has_fusion}
    else:
        # A start is for the fusion that a run began with: a new one has its own, unless it is told.
        kept = {name: value for name, value in values.items() if has_fusion or name != "fusion_start"}
        arguments = {**kept, **switches}
    config = ModelConfig.from_dict(arguments, str(path))
    name = model_name or hyperparameters.get("blip_model_name", "blip2_cir_align_prompt")
    cls = model_class(name)
    if not issubclass(cls, Blip2QformerCirAlignPrompt):
        raise InputError(
            f"{path} holds a re-ranker, {name}; give the checkpoint of its first stage here (scoring and "
            "search take the re-ranker itself as --rerank)"
        )
    if (kind := kind_of(state)) != "sprc":
        cls = CLASSES[kind]
        if switches is not None:
            raise InputError(
                f"{path} holds {TITLES[kind]}, which is scored with here, and not trained; start from "
                "a checkpoint of SPRC"
            )
    model = filled(cls, config, tokenizer, contents, path, new_fusion=switches is not None and not has_fusion)

    epoch = "unknown" if contents["epoch"] is None else contents["epoch"]
    found = f"{path}: {title_of(kind, has_fusion)}, epoch {epoch}"
    if published is not None:
        found += f"; {published.check(path)}"
    if kind != "sprc":
        found += f"; {OWN[kind]}"
    elif not has_fusion:
        if switches is None:
            found += "; fusion is off for scoring"
        else:
            found += "; gated fusion is newly started" if config.use_gated_fusion else "; fusion is off"
    elif "model_config" not in contents and SWITCHES not in state:
        found += (
            f"; it does not say its fusion's switches: taken are pool={config.pool} and "
            f"fusion_text={config.fusion_text}"
        )
    if config.vit_depth != usual:
        found += f"; its vision transformer has {config.vit_depth} blocks, that of {backbone} has {usual}"
    source = source_of(path, contents, name, backbone)
    return Checkpoint(model.eval(), contents["epoch"], hyperparameters, found, source)


def source_of(path: Path, contents: dict[str, Any], name: str, backbone: str) -> Source:
    """Where a file's ``contents`` are from, and what the model in it is called."""
    called = {"blip_model_name": name, "backbone": backbone}
    return Source(path, contents.get("left_out") is not None, contents.get("run", {}), called)


def start_model(
    name: str,
    backbone: str,
    *,
    model_path: Path | None = None,
    vocab: Path | None = None,
    switches: Mapping[str, Any],
    recorded: Mapping[str, Any] | None = None,
) -> Blip2QformerCirAlignPrompt:
    """The model to train: from its backbone's weights, or from a checkpoint's.

    Args:
        name: of the model's class.
        backbone: one of ``sprc.config.BACKBONES``.
        model_path: the checkpoint; None for the backbone's weights.
        vocab: BERT's `vocab.txt`, see :func:`sprc.models.tokenizer.bert_tokenizer`.
        switches: fields of :class:`ModelConfig` that the user sets; they win over ``SPRC_SWITCHES``.
        recorded: the config of the run that goes on. It decides: neither ``SPRC_SWITCHES`` nor the backbone's
            file, which may have changed, has a say.
    """
    if recorded:
        # A field that an earlier version did not write was at its default. The words are the tokenizer's.
        known = {**asdict(ModelConfig()), **recorded}
        decided = {field: value for field, value in known.items() if field != "vocab_size"}
    else:
        decided = {"use_gated_fusion": True, **switches_from_environment(), **switches}
    if model_path is not None:
        checkpoint = load_checkpoint(
            model_path, model_name=name, backbone=backbone, vocab=vocab, switches=decided
        )
        print(checkpoint.found, flush=True)
        return checkpoint.model
    cls = model_class(name)
    if not issubclass(cls, Blip2QformerCirAlignPrompt):
        raise InputError(
            f"--blip-model-name {name} needs a first stage to re-rank for; give --model-path FILE"
        )
    return create_model(cls, backbone, vocab=vocab, **decided)


def described_by_state(
    state: dict[str, Tensor], backbone: str, path: Path, vocab: Path | None
) -> tuple[dict[str, Any], WordPiece]:
    """Config and tokenizer of a file that holds a state dict alone.

    The backbone's values, over them what the shapes say, and over these the switches that a fusion's state
    dict carries.
    """
    told, words = read_switches(state)
    values = {**read_backbone(backbone)["model"], **sizes_of(state), **told}
    tokenizer = tokenizer_of(backbone, vocab)
    if values.get("vocab_size") != len(tokenizer) or words not in (None, vocabulary_digest(tokenizer)):
        raise InputError(
            f"{path} has {values.get('vocab_size')} words and does not hold them, and they are not the "
            f"{len(tokenizer)} of --backbone {backbone}; give the backbone that it was trained on"
        )
    return values, tokenizer


def read_vocabulary(words: list[str], path: Path) -> WordPiece:
    """The tokenizer of a file's vocabulary; words that cannot be kept raise :class:`InputError`."""
    try:
        return WordPiece(words)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a checkpoint of this model: its vocabulary is no text") from error


def read_contents(path: Path) -> dict[str, Any]:
    """Read the file's dictionary without running anything in it, and check its entries' kinds.

    A `model.safetensors` is read with what is beside it, and a descendant's file as one of SPRC's.
    """
    if path.suffix == ".safetensors":
        contents = read_folder(path)
        return check_contents({**contents, STATE: contents.pop("state")}, path)
    try:
        verify_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; give the path of a checkpoint (.pt)") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; give the path of a checkpoint (.pt)") from error
    # A broken file comes out of the unpickler as almost any exception.
    except Exception as error:
        raise InputError(
            f"{path} cannot be loaded safely: it is no checkpoint, is cut short, or holds more than tensors"
        ) from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} is not a checkpoint of this model: it lacks a dictionary")
    return check_contents(as_sprc_s(contents), path)


def check_contents(contents: dict[str, Any], path: Path) -> dict[str, Any]:
    """What :func:`read_contents` read, if its entries are of the right kinds."""
    kinds: dict[str, Any] = {STATE: dict, "epoch": (int, type(None)) if "epoch" in contents else int}
    ours = {"model_config": dict, "vocabulary": list, "hyperparameters": dict}
    if any(key in contents for key in ours):
        kinds |= ours
    for key, kind in kinds.items():
        if not isinstance(contents.get(key), kind):
            problem = "has a wrong" if key in contents else "lacks"
            raise InputError(f"{path} is not a checkpoint of this model: it {problem} {key}")
    if wrong := [key for key, value in contents[STATE].items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} holds entries that are no tensors: {wrong[:5]}")
    if "model_config" in contents:
        words, told = contents["vocabulary"], contents["hyperparameters"]
        if not all(isinstance(word, str) for word in words) or not set(SPECIAL_TOKENS) <= set(words):
            raise InputError(f"{path} is not a checkpoint of this model: its vocabulary is not one of words")
        for key in ("backbone", "blip_model_name"):
            if not isinstance(told.get(key), str):
                raise InputError(f"{path} is not a checkpoint of this model: its hyperparameters lack {key}")
        left_out = contents.get("left_out")
        if left_out is not None and not (
            isinstance(left_out, dict)
            and all(isinstance(left_out.get(key), str) for key in ("backbone", "fingerprint"))
        ):
            raise InputError(f"{path} is not a checkpoint of this model: it has a wrong left_out")
    return contents


def filled(
    cls: type[M],
    config: ModelConfig,
    tokenizer: WordPiece,
    contents: dict[str, Any],
    path: Path,
    *,
    new_fusion: bool = False,
) -> M:
    """A model with the file's parameters, strictly; only what the file says it leaves out may be missing."""
    if len(tokenizer) != config.vocab_size:
        raise InputError(f"{path}: vocab_size={config.vocab_size}, but its vocabulary makes {len(tokenizer)}")
    state = contents[STATE]
    # Building more layers than the file has parameters for could take forever.
    if max(config.vit_depth, config.num_layers) > len(state) + len(contents.get("left_out") or ()) * 1000:
        raise InputError(f"{path} holds parameters of another model: too few for its depths")
    try:
        model = cls(config, tokenizer)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"{path} asks for a model that does not fit into memory: {error}") from error
    own = model.state_dict()
    allowed: dict[str, Tensor] = {
        key: value for key, value in own.items() if key.endswith("position_ids") or key == SWITCHES
    }
    if new_fusion:
        allowed |= {key: value for key, value in own.items() if key.startswith(FUSION)}
    if left_out := contents.get("left_out"):
        allowed |= vit_of_backbone(model.config, left_out, path)
    if details := mismatches(own, state, allowed):
        raise InputError(f"{path} holds parameters of another model ({details})")
    model.load_state_dict({key: state.get(key, allowed.get(key)) for key in own})
    return model


def vit_of_backbone(config: ModelConfig, left_out: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The frozen vision transformer that a checkpoint leaves out, from its backbone, verified."""
    weights = read_backbone(left_out["backbone"])["weights"]
    found = backbone_weights(config, weights, vit_only=True)
    model_keys = {key: value for key, value in found.items() if key.startswith(VIT)}
    with torch.device("meta"):
        needed = Blip2Qformer.vision_transformer(config).state_dict()
    vit = {VIT + key: model_keys[VIT + key] for key in needed if VIT + key in model_keys}
    if len(vit) < len(needed) or fingerprint(vit) != left_out["fingerprint"]:
        raise InputError(
            f"{path} was trained on another {left_out['backbone']} backbone than the one in "
            f"{weights_path(weights['blip2']).parent}; use that one's files, or a checkpoint saved with "
            "--save-full"
        )
    return vit


def fingerprint(state: dict[str, Tensor]) -> str:
    """A hash of names and values in float16, the same whether the weights are kept in float16 or float32."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()
