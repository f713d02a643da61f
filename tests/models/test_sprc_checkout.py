"""In an SPRC checkout: its scripts' calls at 224 pixels, here and, where it is set up, in its environment.

`make test-checkout` sets that environment up (Python 3.9, torch 2.0.1, transformers 4.36.2, timm 0.9.12).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runner import ENVIRONMENT, ROOT, assert_one_clear_line, run, train
from helpers.sprc_pixels import CAPTIONS, pixels

from sprc.data.captions import process_caption
from sprc.models.checkpoint import load_checkpoint

STATE = "Blip2QformerCirAlignPrompt"
SWITCHES = "gated_fusion.switches._extra_state"
THEIR_PYTHON = ROOT / ".venv-checkout" / "bin" / "python"
FUSION = "image_size: 224\nfusion_strategy: weighted\npool: all\n"
FILES = {
    "on": FUSION,
    "off": f"{FUSION}use_gated_fusion: false\n",
    "other": "image_size: 224\nfusion_strategy: weighted\n",
    "frozen": "image_size: 224\nfreeze_vit: true\nfusion_text: contextual\n",
    "small": "fusion_strategy: weighted\n",
}
# Work, checkpoint, switches.
CALLS = (
    ("train", "on", "on"),
    ("score", "on", "on"),
    ("train", "off", "off"),
    ("score", "off", "off"),
    ("train", "frozen", "frozen"),
    ("score", "frozen", "frozen"),
    ("score", "off", "on"),
    ("score", "on", "off"),
    ("score", "on", "other"),
    ("train", "none", "small"),
)


def pythons():
    return [pytest.param(sys.executable, id="here"), pytest.param(str(THEIR_PYTHON), id="theirs")]


class Checkout:
    """A folder with switches and checkpoints, and what one interpreter printed for each of ``calls``."""

    def __init__(self, folder, python, calls):
        for name, text in FILES.items():
            (folder / f"{name}.yaml").write_text(text)
        arguments = [
            word
            for work, file, switches in calls
            for word in (work, folder / f"{file}.pt", folder / f"{switches}.yaml")
        ]
        command = [
            python,
            "-W",
            "ignore",
            str(ROOT / "tests" / "helpers" / "sprc_calls.py"),
            *map(str, arguments),
        ]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr
        self.folder = folder
        self.first, *blocks = result.stdout.split("sprc: blip2_cir_align_prompt, backbone tiny, ")
        assert len(blocks) == len(calls)
        self.printed = dict(zip(calls, blocks, strict=True))

    def distances(self, *call):
        line = next(x for x in self.printed[call].splitlines() if x.startswith("distances "))
        return torch.tensor(json.loads(line.removeprefix("distances ")))

    def refused(self, *call):
        (line,) = [x for x in self.printed[call].splitlines() if x.startswith("refused ")]
        return line

    def state(self, name):
        contents = torch.load(self.folder / f"{name}.pt", weights_only=True)
        assert set(contents) == {"epoch", STATE}
        return contents[STATE]


@pytest.fixture(scope="module", params=pythons())
def checkout(request, tmp_path_factory):
    if request.param == sys.executable:
        pytest.importorskip("lavis", reason="LAVIS is not installed")
    elif not Path(request.param).exists():
        pytest.skip("SPRC's own environment is not set up: make test-checkout")
    return Checkout(tmp_path_factory.mktemp("checkout"), request.param, CALLS)


@pytest.mark.slow
def test_their_class_is_replaced_and_a_line_says_so(checkout):
    assert "blip2_cir_align_prompt was __main__.Theirs and is now SPRC with gated fusion" in checkout.first


@pytest.mark.parametrize("switch", ["on", "off", "frozen"])
def test_their_scripts_train_score_and_load_what_they_saved(checkout, switch):
    told = f"use_gated_fusion={switch != 'off'}"
    assert checkout.printed["train", switch, switch].startswith(told)
    assert "Missing keys []" in checkout.printed["score", switch, switch]
    trained, scored = (checkout.distances(work, switch, switch) for work in ("train", "score"))
    assert trained.shape == (5, 6)
    assert torch.equal(trained, scored)


def test_a_checkpoint_of_one_side_is_refused_on_the_other_with_the_line_to_write(checkout):
    for call, line in (
        (("score", "off", "on"), "is plain SPRC, and not as this model is; write `use_gated_fusion: false`"),
        (("score", "on", "off"), "is SPRC with gated fusion, and not as this model is; write `use_gated_"),
        (("score", "on", "other"), "write `pool: all` into"),
        (
            ("train", "none", "small"),
            "224 x 224 pixels, and the model takes 96 x 96; write `image_size: 224`",
        ),
    ):
        message = checkout.refused(*call)
        assert line in message
        assert call[0] == "train" or f"{call[2]}.yaml" in message


def test_plain_state_dicts_are_the_published_format(checkout):
    on, off = checkout.state("on"), checkout.state("off")
    assert SWITCHES in on
    assert not [key for key in off if "fusion" in key]
    assert set(off) == {key for key in on if not key.startswith("gated_fusion.")}


@pytest.mark.parametrize("switch", ["on", "off", "frozen"])
def test_ours_rebuilds_what_their_scripts_saved(checkout, switch):
    """The words of `tiny`, the image size and the switches come from the state dict: the same distances."""
    path = checkout.folder / f"{switch}.pt"
    loaded = load_checkpoint(path, backbone="tiny")
    assert f"{path}: {'plain SPRC' if switch == 'off' else 'SPRC with gated fusion'}, epoch 0" in loaded.found
    gallery, references = loaded.model.extract_target_features(torch.stack([pixels(n) for n in range(6)]))
    captions = [process_caption(text) for text in CAPTIONS]
    distances = 1 - loaded.model.inference(references[:5], gallery, captions)
    expected = checkout.distances("score", switch, switch)
    torch.testing.assert_close(distances, expected, atol=1e-5, rtol=0)


def test_our_scripts_validate_and_go_on_from_their_checkpoint(checkout, data, tmp_path):
    path = checkout.folder / "on.pt"
    flags = ("--dataset", "CIRR", "--data-path", data, "--backbone", "tiny", "--model-path", path)
    stdout, _ = run("blip_validate.py", *flags)
    assert "SPRC with gated fusion, epoch 0" in stdout
    assert "recall_at5" in stdout
    folder, stdout, _ = train(data, tmp_path, "--model-path", path)
    written = json.loads((folder / "training_hyperparameters.json").read_text())
    assert (written["image_size"], written["pool"], written["fusion_strategy"]) == (224, "all", "weighted")
    _, stderr = run("blip_validate.py", *flags[:4], "--model-path", path, code=2)
    assert_one_clear_line(stderr, "does not say which backbone it was trained on; pass --backbone")
