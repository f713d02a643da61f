"""What several ranks do, for test_distributed.py, which starts this program once and reads what it leaves.

Each case forks as many processes as it has ranks, with the environment that torchrun would give them: so the
libraries are imported once for all of them. A rank's stderr and exit code are in its case's folder.

    python tests/helpers/several_ranks.py OUT DATA CHECKPOINT
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from helpers.reranking import make_first_stage, make_reranker, make_task
from helpers.reranking import make_trainer as make_reranker_trainer
from helpers.small_models import VOCABULARY, random_images, randomise, small_config
from helpers.small_split import NAMES, REFERENCES, TRIPLETS
from helpers.wider import make_model, make_negatives, make_trainer
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from sprc.data.split import Split
from sprc.data.synthetic.circo import CIRCOConfig, make_circo
from sprc.data.transforms import make_transform
from sprc.distributed import process_group, rank, world_size
from sprc.errors import InputError, Interrupted, run_script
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.device import memory_explained
from sprc.models.factory import _read, create_model
from sprc.models.tokenizer import WordPiece
from sprc.scoring.encoding import encode_split
from sprc.scoring.feature_cache import FeatureCache
from sprc.scoring.reranking import match_split
from sprc.scoring.settings import SubmissionSettings, ValidationSettings
from sprc.scoring.submission import run_submission
from sprc.scoring.validation import run_validation
from sprc.training.fusion_log import FusionLog
from sprc.training.loop import Trainer, TrainingConfig

FORK = multiprocessing.get_context("fork")
FUSION = {"on": {}, "off": {"use_gated_fusion": False}}
STEPS = {"num_epochs": 5, "batch_size": 8, "learning_rate": 1e-3, "num_workers": 0}  # 4 steps an epoch


def on_ranks(ranks, folder, case, *arguments, timeout=60):
    """Run ``case(folder, *arguments)`` on so many ranks; leave `stderr_R.txt` and `codes.json` there."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As torchrun's agent does: the notes that all ranks read outlive each of them. In a process of its own,
    # because they need threads, and a process that has threads must not fork.
    notes = FORK.Process(target=keep_notes, args=(port,))
    notes.start()
    processes = []
    for number in range(ranks):
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment |= {name: str(value) for name, value in told.items()}
        target = (environment, timeout, folder, case, arguments)
        processes.append(FORK.Process(target=one_rank, args=target))
        processes[-1].start()
    end = time.monotonic() + 120
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
        if process.is_alive():
            process.kill()  # a hang: its code is -9
            process.join()
    notes.kill()
    notes.join()
    (folder / "codes.json").write_text(json.dumps([process.exitcode for process in processes]))


def keep_notes(port):
    _store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()


def one_rank(environment, timeout, folder, case, arguments):
    os.environ |= environment
    sys.stderr = (folder / f"stderr_{environment['RANK']}.txt").open("w", buffering=1)

    def main():
        with process_group(timeout):
            case(folder, *arguments)

    run_script(main)


class Triplets(Dataset):
    """Random pixels and captions."""

    def __init__(self, size, count=32):
        self.image, self.target = torch.randn(
            2, count, 3, size, size, generator=torch.Generator().manual_seed(1)
        )
        self.texts = [" ".join(VOCABULARY[5 + number % 7 :][: 1 + number % 5]) for number in range(count)]

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"image": self.image[index], "target": self.target[index], "text_input": self.texts[index]}


def no_validation(_stop_if_asked):
    return {"recall": 0.0}


def note_steps(trainer):
    """The losses of each step and the first step's gradients, which fill as the trainer trains."""
    losses, gradients = [], {}
    agree, after_backward = trainer.agree, trainer.after_backward

    def agree_and_note(*arguments):
        values, signum = agree(*arguments)
        losses.append(values)
        return values, signum

    def note_and_go_on():
        if not gradients:
            named = trainer.model.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        after_backward()

    trainer.agree, trainer.after_backward = agree_and_note, note_and_go_on
    return losses, gradients


def train(folder, changes, triplets=Triplets, validate=no_validation, contrast="infonce", **settings):
    """Twenty steps of `tiny`; the losses of each, the first step's gradients and the last weights."""
    folder.mkdir(exist_ok=True)
    (folder / "saved_models").mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = create_model(Blip2QformerCirAlignPrompt, "tiny", **{"freeze_vit": False, **changes})
    model.contrast = contrast
    config = TrainingConfig(**{**STEPS, "loss_weights": {"loss_rtc": 0.4, "loss_align": 0.4}, **settings})
    trainer = Trainer(model, triplets(model.config.image_size), config, folder)
    note = trainer.load_state()
    if model.gated_fusion is not None:
        trainer.after_backward = FusionLog(model.gated_fusion, folder, every=2).after_backward
    losses, gradients = note_steps(trainer)
    trainer.train(validate, lambda *_: None)
    if rank() == 0:
        found = {"losses": losses, "gradients": gradients, "weights": model.state_dict(), "note": note}
        torch.save(found, folder / "found.pt")
    return trainer


def train_cached(folder, changes, chunk):
    train(folder, changes, grad_cache=chunk, num_epochs=2)


def train_complementary(folder):
    weights = {"loss_itc": 0.25, "loss_itc_complementary": 0.75, "loss_rtc": 0.1}
    train(folder, FUSION["on"], contrast="complementary", num_epochs=1, loss_weights=weights)


def train_wider(folder, cached):
    """Eight steps with a bank and mined images: losses, the first gradients, weights, and what was drawn."""
    model = make_model(dropout=0.0, fusion_dropout=0.0)
    flags = {"negatives": "both", "refresh_bank": 1, "negatives_per_query": 2}
    negatives = make_negatives(folder, model, **flags)
    trainer = make_trainer(folder, model, negatives, num_epochs=2, grad_cache=1 if cached else None)
    losses, gradients = note_steps(trainer)
    trainer.train(no_validation, lambda *_: None)
    if rank() == 0:
        bank, drawn = negatives.bank.features, negatives.drawn
        found = {"losses": losses, "gradients": gradients, "bank": bank, "drawn": drawn}
        torch.save(found, folder / "found.pt")


def train_reranker(folder, cached):
    """Six steps of a re-ranker, and before them what it says of its candidates, read in three batches."""
    model = make_reranker(make_first_stage(dropout=0.0))
    task = make_task(folder, make_first_stage(), model)
    calls = []
    split, encoded, options = task.scored[0], task.encoded[0], {"batch_size": 4, "num_workers": 0, "top": 5}
    matches = match_split(model, split, encoded, task.load, on_batch=lambda: calls.append(0), **options)
    torch.save({"scores": matches.scores, "calls": len(calls)}, folder / f"matches_{rank()}.pt")
    config = {"num_epochs": 2, "grad_cache": 1 if cached else None}
    trainer = make_reranker_trainer(folder, model, task, **config)
    losses, gradients = note_steps(trainer)
    trainer.train(no_validation, lambda *_: None)
    if rank() == 0:
        torch.save({"losses": losses, "gradients": gradients}, folder / "found.pt")


def train_alone(folder):
    train(folder, {}, num_epochs=2, alone_epochs=1, alone_prefix="gated_fusion.")


class Signalled(Triplets):
    """Rank 1 is sent SIGTERM while it reads the batch of the sixth step."""

    count = 0

    def __getitem__(self, index):
        self.count += 1
        if rank() == 1 and self.count == 5 * 8 // world_size() + 1:
            for _ in range(2):  # torchrun and Slurm may both send it
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class Validation:
    """Encodes seven images one by one: rank 0 has a batch more than rank 1.

    In the second epoch rank 1 is sent SIGTERM while it reads its image number ``signal_at``, from 1.
    """

    def __init__(self, signal_at=None):
        self.signal_at, self.epoch, self.read = signal_at, 0, 0
        self.config = small_config()
        state = torch.get_rng_state()
        self.model = Blip2QformerCirAlignPrompt(self.config, WordPiece(VOCABULARY))
        torch.set_rng_state(state)
        self.pixels = dict(zip(NAMES, random_images(len(NAMES), self.config), strict=True))

    def load(self, path):
        self.read += 1
        if rank() == 1 and self.epoch == 2 and self.read == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.pixels[path.name]

    def __call__(self, stop_if_asked):
        self.epoch, self.read = self.epoch + 1, 0
        split = Split("val", TRIPLETS, {name: Path("folder") / name for name in NAMES})
        options = {"batch_size": 1, "num_workers": 0, "on_batch": stop_if_asked}
        encode_split(self.model, split, self.load, **options)
        return {"recall": 0.0}


def with_dropout(folder, run=None, triplets=Triplets, signal_at=None):
    """Twelve steps, from the state in the folder ``run`` if there is one; a signal is noted."""
    changes = {"dropout": 0.1, "fusion_dropout": 0.1}
    try:
        train(run or folder, changes, triplets, Validation(signal_at), num_epochs=3)
    except Interrupted as stop:
        (folder / f"stopped_{rank()}.txt").write_text(str(stop))


class OneWeight(nn.Module):
    """Its loss is not a number on rank 1, in the third step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.device, self.diagnostics, self.steps = torch.device("cpu"), {}, 0

    def forward(self, samples):
        self.steps += 1
        broken = rank() == 1 and self.steps == 3
        return {"loss_first": self.weight * (torch.nan if broken else 1.0), "loss_second": self.weight**2}


def not_a_number(folder):
    (folder / "saved_models").mkdir(exist_ok=True)
    trainer = Trainer(OneWeight(), Triplets(4), TrainingConfig(**STEPS), folder)
    trainer.train(no_validation, lambda *_: None)


def control_c(folder):
    os.kill(os.getpid(), signal.SIGINT)


def bad_input(folder, guilty):
    if rank() in guilty:
        raise InputError("--flag 1 is wrong; give another")
    torch.distributed.barrier()


def killed(folder):
    if rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def stuck(folder):
    if rank() == 1:
        time.sleep(12)
    torch.distributed.all_reduce(torch.zeros(1))


def out_of_memory(folder):
    if rank() == 1:
        with memory_explained(torch.device("cpu"), 64, ["a smaller --batch-size"]):
            torch.empty(2**60)
    torch.distributed.barrier()


def bug(folder):
    if rank() == 1:
        raise ZeroDivisionError("a bug")
    torch.distributed.barrier()


def encode(folder):
    """The split of test_validation.py, and which images this rank read."""
    for fusion, dtype in ((True, "float32"), (False, "float16")):
        config = small_config(use_gated_fusion=fusion)
        model = Blip2QformerCirAlignPrompt(config, WordPiece(VOCABULARY))
        randomise(model)
        pixels = dict(zip(NAMES, random_images(len(NAMES), config), strict=True))
        read = []

        def load(path, read=read, pixels=pixels):
            read.append(path.name)
            return pixels[path.name]

        split = Split("val", TRIPLETS, {name: Path("folder") / name for name in NAMES})
        encoded = encode_split(model, split, load, batch_size=2, num_workers=0, gallery_dtype=dtype)
        found = {"gallery": encoded.gallery, "composed": encoded.composed, "text": encoded.text_only}
        torch.save({**found, "read": read}, folder / f"encoded_{fusion}_{rank()}.pt")
    assert len(REFERENCES) == len(encoded.composed)


def fill_cache(folder, images):
    """A cache of seven images in batches of two, then of nine, of which two are there damaged."""
    torch.manual_seed(0)
    model = create_model(Blip2QformerCirAlignPrompt, "tiny")
    transform = make_transform("targetpad", model.config.image_size, 1.25)
    computed = []
    vit_tokens = model.vit_tokens
    model.vit_tokens = lambda images: computed.append(len(images)) or vit_tokens(images)
    paths = sorted(images.iterdir())
    for count in (7, 9):
        cache = FeatureCache(
            folder / "cache", model, {"transform": "targetpad", "target_ratio": 1.25}, "float16"
        )
        told = cache.fill(paths[:count], model, transform, batch_size=2, num_workers=0)
        tokens = torch.stack([cache(path) for path in paths[:count]])
        found = {"told": told, "computed": sum(computed), "tokens": tokens}
        torch.save(found, folder / f"filled_{count}_{rank()}.pt")
        computed.clear()


def submit(folder, data, checkpoint):
    settings = SubmissionSettings(
        data_path=data, model_path=checkpoint, out=folder, name="test", batch_size=7, num_workers=1
    )
    paths = run_submission(settings)
    (folder / f"told_{rank()}.json").write_text(json.dumps([path.name for path in paths]))


def score_circo(folder, data, checkpoint):
    """Validation and submission on CIRCO."""
    given = {
        "dataset": "circo",
        "data_path": data,
        "model_path": checkpoint,
        "batch_size": 7,
        "num_workers": 0,
    }
    files = {"save_ranks": folder / "ranks.csv", "save_rankings": folder / "rankings.json"}
    metrics = run_validation(ValidationSettings(**given, **files))
    (folder / f"metrics_{rank()}.json").write_text(json.dumps(metrics))
    run_submission(SubmissionSettings(**given, out=folder, name="test"))


def fetch(folder):
    """A backbone's file: the first rank of the machine has it on the disk before the second asks."""

    def fake(url, path, **_):
        (folder / f"fetched_{rank()}").touch()
        time.sleep(0.5)
        torch.save({"weight": torch.ones(2)}, path)

    torch.hub.set_dir(str(folder / "hub"))
    torch.hub.download_url_to_file = fake
    assert list(_read("https://example.org/weights.pth", None)) == ["weight"]


def make_images(folder):
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (20 + number, 30), (20 * number, 90, 7 * number)).save(folder / f"{number}.png")
    return folder


def main(out, data, checkpoint):
    torch.set_num_threads(1)
    images = make_images(out / "images")
    torch.set_default_dtype(
        torch.float64
    )  # in float32 rounding alone moves what has no gradient, see the test
    for ranks in (1, 2, 4):
        for name, changes in FUSION.items():
            on_ranks(ranks, out / f"plain_{name}_{ranks}", train, changes)
    for ranks, name, chunk in ((1, "on", 3), (2, "off", 3), (4, "on", 1)):
        on_ranks(ranks, out / f"cached_{name}_{ranks}", train_cached, FUSION[name], chunk)
    for ranks, cached in ((1, False), (2, False), (2, True)):
        on_ranks(ranks, out / f"wider_{ranks}{'_cached' if cached else ''}", train_wider, cached)
    for ranks in (1, 2):
        on_ranks(ranks, out / f"complementary_{ranks}", train_complementary)
        on_ranks(ranks, out / f"alone_on_{ranks}", train_alone)
    torch.set_default_dtype(torch.float32)
    for ranks, cached in ((1, False), (2, False), (2, True)):
        on_ranks(ranks, out / f"reranker_{ranks}{'_cached' if cached else ''}", train_reranker, cached)
    for ranks in (1, 2, 4):
        on_ranks(ranks, out / f"encode_{ranks}", encode)
        on_ranks(ranks, out / f"cache_{ranks}", fill_cache, images)
    on_ranks(2, out / "fetch", fetch)
    for ranks in (1, 2):
        on_ranks(ranks, out / f"submit_{ranks}", submit, data, checkpoint)
    make_circo(out / "made", CIRCOConfig(image_size=24, val_families=1, test_families=1))
    for ranks in (1, 2):
        on_ranks(ranks, out / f"circo_{ranks}", score_circo, out / "made", checkpoint)
    on_ranks(2, out / "whole", with_dropout)
    on_ranks(2, out / "stopped", with_dropout, None, Signalled)
    shutil.copytree(out / "stopped", out / "stopped_too")
    on_ranks(2, out / "resumed", with_dropout, out / "stopped")
    on_ranks(1, out / "resumed_alone", with_dropout, out / "stopped_too")
    for number in (1, 3):  # the third image is the last one of rank 1
        on_ranks(2, out / f"validating_{number}", with_dropout, None, Triplets, number)
    shutil.copytree(out / "validating_3", out / "validating_alone")
    for number in (1, 3):
        on_ranks(2, out / f"resumed_{number}", with_dropout, out / f"validating_{number}")
    on_ranks(1, out / "resumed_validating_alone", with_dropout, out / "validating_alone")
    on_ranks(2, out / "control_c", control_c)
    on_ranks(2, out / "not_a_number", not_a_number)
    on_ranks(4, out / "bad_input_of_all", bad_input, (0, 1, 2, 3))
    on_ranks(4, out / "bad_input_of_one", bad_input, (2,))
    on_ranks(2, out / "out_of_memory", out_of_memory)
    on_ranks(2, out / "bug", bug)
    on_ranks(4, out / "killed", killed)
    on_ranks(2, out / "stuck", stuck, timeout=3)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
