"""What tests of the search share: a model that was not trained, and the two commands without a process."""

import struct
import zlib

import torch

from sprc.data.split import triplets_of
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import load_checkpoint, save_checkpoint
from sprc.models.factory import create_model
from sprc.models.reranker import digest_of_weights, start_reranker
from sprc.scoring.benchmarks import benchmark_class
from sprc.search.commands import run_index, run_query
from sprc.search.settings import IndexSettings, QuerySettings
from sprc.training.resume import digest_of_data

TEXT = "make the small circle blue"


def digest_of_cirr(data):
    """As a run on these data notes it."""
    benchmark = benchmark_class("CIRR").load(data, None)
    triplets, _ = triplets_of(benchmark.train_splits(data))
    return digest_of_data(benchmark.splits, triplets)


def save_model(path, data, seed, **switches):
    torch.manual_seed(seed)
    model = create_model(Blip2QformerCirAlignPrompt, "tiny", **switches)
    if model.gated_fusion is not None:
        with torch.no_grad():  # an edit that is felt
            model.gated_fusion.alpha.fill_(3.0)
    told = {
        "backbone": "tiny",
        "blip_model_name": "blip2_cir_align_prompt",
        "batch_size": 8,
        "num_workers": 0,
        "digests": {"data_path": digest_of_cirr(data)},
    }
    save_checkpoint(path, model, 3, told)
    return path


def save_reranker(path, checkpoint, seed=0):
    """A re-ranker of the checkpoint's model that was not trained either; returned in eval mode."""
    first = load_checkpoint(checkpoint).model
    model = start_reranker(first)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # so that its order is another than the first stage's
        for parameter in (*model.Qformer.parameters(), *model.itm_head.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    told = {"backbone": "tiny", "blip_model_name": "blip2_cir_rerank"}
    told |= {"first_stage": digest_of_weights(first), "first_stage_name": str(checkpoint)}
    save_checkpoint(path, model, 1, told)
    return model.eval()


def make_index(path, folder, checkpoint, **flags):
    """As `search.py index` does, in this process."""
    run_index(IndexSettings(folder=folder, model_path=checkpoint, index=path, **{"device": "cpu", **flags}))


def query(index, **flags):
    """As `search.py query` does, in this process."""
    given = {"image": "a/dev-0-0-img0.png", "text": TEXT, "top": 5, "device": "cpu", **flags}
    run_query(QuerySettings(index=index, **given))


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
