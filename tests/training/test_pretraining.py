"""Pre-training of `tiny`: the first stage's losses, the scenes, and the file of weights."""

import hashlib
import json
import random

import pytest
import torch
import torch.nn.functional as F
from helpers.runner import assert_one_clear_line, run, train
from safetensors import safe_open
from safetensors.torch import load_file

from sprc.config import MODEL_DIR, read_backbone
from sprc.data.synthetic.described import DescribedScenes, draw_scenes
from sprc.data.synthetic.descriptions import describe, held_out_scenes
from sprc.data.synthetic.scenes import render
from sprc.data.transforms import make_transform
from sprc.errors import InputError
from sprc.models import shipped
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import load_checkpoint
from sprc.models.factory import create_model, load_backbone, tokenizer_of
from sprc.training import first_stage
from sprc.training.first_stage import FirstStage, contrast
from sprc.training.pretraining import BACKBONE, score, untrained_model
from sprc.training.settings import PretrainingSettings

FLAGS = ("--scenes", 64, "--num-epochs", 2, "--batch-size", 16, "--num-workers", 0, "--device", "cpu")
TEXTS = ["a red circle in the center", "a small star and a blue square", "two crosses", "a diamond"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Eight steps; the folder, and what was printed."""
    out = tmp_path_factory.mktemp("pretrained")
    return out, run("pretrain_tiny.py", "--out", out, *FLAGS)[0]


@pytest.fixture
def stage():
    torch.manual_seed(3)
    return FirstStage(untrained_model())


def pixels(count=4):
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_a_few_steps_give_a_backbone_that_loads_like_the_others(pretrained):
    out, stdout = pretrained
    file = out / "tiny.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"sha256: {digest}" in stdout
    state = load_file(file)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert not [name for name in state if name.startswith(("prompt_tokens", "gated_fusion"))]
    model = Blip2QformerCirAlignPrompt(create_model(Blip2QformerCirAlignPrompt, BACKBONE).config, words())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_backbone(model, {"blip2": str(file), "sha256": digest})
    after = model.state_dict()
    for name, value in state.items():
        assert torch.equal(after[name], value.float()), name
    for name in ("prompt_tokens", "gated_fusion.gate_mlp.0.weight"):  # SPRC's own start at random
        assert torch.equal(after[name], before[name])


def words():
    return tokenizer_of(BACKBONE)


def test_the_same_command_again_goes_on_and_gives_the_same_bytes(pretrained, tmp_path):
    out, _ = pretrained
    before = (out / "tiny.safetensors").read_bytes()
    (out / "tiny.safetensors").unlink()
    run("pretrain_tiny.py", "--out", out, *FLAGS)  # all epochs are done
    assert (out / "tiny.safetensors").read_bytes() == before
    run("pretrain_tiny.py", "--out", tmp_path / "new", *FLAGS)
    assert (tmp_path / "new/tiny.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scenes", 15), "--scenes 15 do not fill a batch; give 16 or more"),
        (("--learning-rate", 0), "--learning-rate 0.0 must be a positive number"),
        (("--seed", 7), "holds a run of other settings (training_hyperparameters.json has them)"),
    ],
)
def test_wrong_input_is_one_clear_line(pretrained, flags, message):
    _, stderr = run("pretrain_tiny.py", "--out", pretrained[0], *FLAGS, *flags, code=2)
    assert_one_clear_line(stderr, message)


def test_contrast_is_the_mean_of_both_directions(stage):
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for i in range(5):
        row, column = logits[i].exp(), logits[:, i].exp()
        expected -= (logits[i, i].exp() / row.sum()).log() + (logits[i, i].exp() / column.sum()).log()
    assert contrast(logits).item() == pytest.approx(expected.item() / 10, rel=1e-12)


@torch.no_grad()
def test_matching_pairs_each_with_one_wrong_image_and_one_wrong_text(stage, monkeypatch):
    """The loss, from pairs scored one by one; the wrong ones are those that contrast finds alike."""
    stage.eval()
    model, images = stage.model, pixels()
    monkeypatch.setattr(first_stage, "WRONG_TEMPERATURE", 1e-3)  # so that there is nothing to draw
    # But for its own, text 0 is most like image 2, 1 like 0, 2 like 3, 3 like 1; columns likewise.
    alike = torch.tensor([[9, 1, 5, 2], [6, 9, 2, 1], [1, 3, 9, 7], [2, 8, 4, 9.0]])
    wrong_image, wrong_text = [2, 0, 3, 1], [1, 3, 0, 2]
    keys = model.Qformer.bert.image_keys(model.encode_image(images))

    def logits(image, text):
        queries = model.prompts_of(
            model.encode_image(images[image : image + 1]), model.tokenize([TEXTS[text]])
        )
        return torch.stack([model.itm_head(query) for query in queries[0]]).mean(dim=0)

    pairs = [(i, i, 1) for i in range(4)] + [(wrong_image[i], i, 0) for i in range(4)]
    pairs += [(i, wrong_text[i], 0) for i in range(4)]
    expected = sum(-logits(i, t).log_softmax(0)[answer].item() for i, t, answer in pairs) / len(pairs)
    assert stage.matching_loss(keys, TEXTS, alike).item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_text_s_vector_is_that_of_its_first_token(stage):
    stage.eval()
    alone = torch.cat([stage.text_features([text]) for text in TEXTS])
    torch.testing.assert_close(stage.text_features(TEXTS), alone, atol=1e-5, rtol=0)
    hidden = stage.model.words_in_context(stage.model.tokenize(TEXTS[:1]))[0, 0]
    torch.testing.assert_close(alone[0], F.normalize(stage.model.text_proj(hidden), dim=0))


def test_all_of_blip_2_s_parts_are_trained_and_nothing_of_sprc_s(stage):
    losses = stage({"image": pixels(), "text_input": TEXTS})
    assert set(losses) == {"loss_itc", "loss_itm"}
    sum(losses.values()).backward()
    for name in ("visual_encoder.patch_embed.proj.weight", "itm_head.weight", "query_tokens", "temp"):
        assert stage.model.get_parameter(name).grad.abs().sum() > 0, name
    assert stage.model.prompt_tokens.grad is None


def test_no_scene_of_the_benchmark_s_validation_and_test_is_trained_on():
    held_out = held_out_scenes()
    scenes = draw_scenes(3000, 0, set(held_out))
    assert len(set(scenes)) == 3000
    assert not held_out & set(scenes)
    assert scenes[:100] == draw_scenes(100, 0, set(held_out))
    assert scenes[:100] != draw_scenes(100, 1, set(held_out))
    # It is not for want of meeting them.
    first = next(iter(scenes))
    assert first not in draw_scenes(100, 0, {first})


def test_an_item_is_a_scene_as_training_reads_it_and_a_new_description_each_epoch():
    scenes, transform = draw_scenes(3, 0, set()), make_transform("targetpad", 96)
    described = DescribedScenes(scenes, transform, 96, seed=4)
    item = described[1]
    assert torch.equal(item["image"], transform(render(scenes[1], 96)))
    assert item["text_input"] == describe(scenes[1], random.Random("4 0 1"))
    texts = set()
    for epoch in range(5):
        described.set_epoch(epoch)
        texts.add(described[1]["text_input"])
    assert len(texts) > 1


def test_the_shipped_file_is_what_the_default_command_makes_by_its_header():
    recipe = read_backbone(BACKBONE)
    file = MODEL_DIR / recipe["weights"]["blip2"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recipe["weights"]["sha256"]
    with safe_open(str(file), "pt") as opened:
        made_by = json.loads(opened.metadata()["made_by"])
    default = vars(PretrainingSettings(out=None))
    assert made_by == {name: default[name] for name in made_by}
    assert {"scenes", "num_epochs", "batch_size", "learning_rate", "seed"} <= set(made_by)


def test_the_shipped_weights_tie_descriptions_to_scenes_they_have_not_seen():
    """Of 200: chance is 0.5 % and 50 %. The bounds are far below what the file reaches among 1,000."""
    model = create_model(Blip2QformerCirAlignPrompt, BACKBONE, use_gated_fusion=False)
    scenes = draw_scenes(200, 12345, held_out_scenes())
    pairs = DescribedScenes(scenes, make_transform("targetpad", 96), 96, seed=1)
    found = score(FirstStage(model), pairs, batch_size=100)
    assert found["text_to_image_at1"] > 30
    assert found["image_to_text_at1"] > 30
    assert found["matching_accuracy"] > 65


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny_vocab.txt"])
@pytest.mark.parametrize("state", ["missing", "altered", "cut short", "a folder"])
def test_a_shipped_file_that_is_not_as_it_was_is_one_clear_line(tmp_path, monkeypatch, name, state):
    for other in ("tiny.safetensors", "tiny_vocab.txt"):
        contents = (MODEL_DIR / other).read_bytes()
        if other != name:
            (tmp_path / other).write_bytes(contents)
        elif state == "altered":
            (tmp_path / other).write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
        elif state == "cut short":
            (tmp_path / other).write_bytes(contents[:-100])
        elif state == "a folder":
            (tmp_path / other).mkdir()
    monkeypatch.setattr(shipped, "MODEL_DIR", tmp_path)
    message = {"missing": "is missing, and comes with", "a folder": "cannot be read"}.get(
        state, "is not the file"
    )
    with pytest.raises(InputError, match=f"{name} {message}"):
        create_model(Blip2QformerCirAlignPrompt, BACKBONE)


def test_a_training_leaves_the_shipped_vit_as_it_is_unless_it_is_told_to_train_it(data, tmp_path):
    shipped_vit = create_model(Blip2QformerCirAlignPrompt, BACKBONE).visual_encoder.state_dict()
    for flags, same in (((), True), (("--no-freeze-vit",), False)):
        folder, _, _ = train(data, tmp_path / str(same), "--save-training", "--save-best", *flags)
        trained = load_checkpoint(folder / "saved_models/tuned_clip_arithmetic.pt").model
        for name, value in trained.visual_encoder.state_dict().items():
            assert torch.equal(value, shipped_vit[name]) == same, name
