"""From a checkpoint of any kind to a folder that others load, and to the model hub (``export_model.py``)."""

from __future__ import annotations

import torch

from sprc.config import RERANKER, ModelConfig
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.models.checkpoint import (
    filled,
    load_checkpoint,
    read_contents,
    read_vocabulary,
    saved_of,
    source_of,
)
from sprc.models.hub import NAME
from sprc.models.hub_folder import Saved
from sprc.models.hub_model import push, save
from sprc.models.model_path import find_model
from sprc.scoring.retriever import PREPROCESSING, Retriever
from sprc.scoring.settings import ExportSettings


@torch.no_grad()
def export_model(settings: ExportSettings) -> None:
    """Write the folder, push it if asked to, and print where it is.

    Raises :class:`InputError`, see :func:`sprc.models.checkpoint.load_checkpoint`, and where the folder
    cannot be made or the hub does not take it.
    """
    if settings.push_to is None and (settings.revision or settings.private):
        flag = f"--revision {settings.revision}" if settings.revision else "--private"
        raise InputError(f"{flag} is about the model hub; give --push-to USER/NAME, or leave it out")
    if settings.push_to is not None and not NAME.fullmatch(settings.push_to):
        raise InputError(f"--push-to {settings.push_to!r} is no name of the model hub; give USER/NAME")
    if settings.out.exists() and not settings.out.is_dir():
        raise InputError(f"--out {settings.out} is a file; give a folder")
    saved = load_saved(settings)
    print(f"wrote {save(saved, settings.out)}", flush=True)
    if settings.push_to is not None:
        private = True if settings.private else None
        print(f"pushed: {push(saved, settings.push_to, revision=settings.revision, private=private)}")


def load_saved(settings: ExportSettings) -> Saved:
    """What is to be saved of the checkpoint; what the file holds is printed."""
    path = find_model(settings.model_path)
    contents = read_contents(path)
    told = contents.get("hyperparameters", {})
    if told.get("blip_model_name") == RERANKER:
        if settings.transform is not None or settings.target_ratio is not None:
            raise InputError(
                f"{path} holds a re-ranker, whose pictures are its first stage's; leave --transform out"
            )
        config = ModelConfig.from_dict(contents["model_config"], str(path))
        tokenizer = read_vocabulary(contents["vocabulary"], path)
        model = filled(Blip2QformerCirRerank, config, tokenizer, contents, path).eval()
        source = source_of(path, contents, RERANKER, told["backbone"])
        print(f"{path}: re-ranker, epoch {contents['epoch']}", flush=True)
        told = {**PREPROCESSING, **told}
        return saved_of(model, contents["epoch"], told, source, full=settings.save_full)
    checkpoint = load_checkpoint(
        path,
        model_name=settings.blip_model_name,
        backbone=settings.backbone,
        vocab=settings.vocab,
        contents=contents,
    )
    del contents
    for line in checkpoint.told():
        print(line, flush=True)
    retriever = Retriever.of(checkpoint, transform=settings.transform, target_ratio=settings.target_ratio)
    return retriever.saved(save_full=settings.save_full)
