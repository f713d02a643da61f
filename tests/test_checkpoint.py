"""A checkpoint rebuilds its model with no flag, and anything else is refused in one line."""

import pickle

import pytest
import torch
from conftest import CAPTIONS, random_images, randomise, small_config

from sprc.checkpoint import STATE, load_checkpoint, save_checkpoint
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt

HYPERPARAMETERS = {"blip_model_name": "blip2_cir_align_prompt", "backbone": "tiny", "seed": 3}


@pytest.fixture
def model(tokenizer):
    model = Blip2QformerCirAlignPrompt(small_config(fusion_strategy="weighted", pool="all"), tokenizer)
    randomise(model)
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "tuned_clip_arithmetic.pt"
    save_checkpoint(path, model, 7, HYPERPARAMETERS)
    return path


def test_the_model_comes_back_with_its_switches_words_and_results(model, saved):
    loaded = load_checkpoint(saved)
    assert loaded.epoch == 7
    assert loaded.hyperparameters == HYPERPARAMETERS
    assert loaded.model.config == model.config
    assert loaded.model.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert not loaded.model.training
    targets, references = model.extract_target_features(random_images(3, model.config))
    same_targets, same_references = loaded.model.extract_target_features(random_images(3, model.config))
    assert torch.equal(
        model.inference(references, targets, CAPTIONS),
        loaded.model.inference(same_references, same_targets, CAPTIONS),
    )


def test_it_holds_the_two_published_entries_and_loads_without_pickle(model, saved):
    contents = torch.load(saved, weights_only=True)
    assert contents["epoch"] == 7
    assert set(contents[STATE]) == set(model.state_dict())
    assert STATE == "Blip2QformerCirAlignPrompt"


class Payload:
    def __reduce__(self):
        return open, ("owned", "w")


def change(path, **entries):
    contents = torch.load(path, weights_only=True)
    for key, value in entries.items():
        if value is None:
            del contents[key]
        else:
            contents[key] = value
    torch.save(contents, path)


def test_whatever_is_no_checkpoint_of_this_model_is_refused_in_one_line(model, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = saved.read_bytes()
    state = model.state_dict()
    foreign = {key: value for key, value in state.items() if "text_proj" not in key} | {"x": torch.ones(1)}
    cases = {
        "is missing": lambda: saved.unlink(),
        "cut short": lambda: saved.write_bytes(whole[: len(whole) // 2]),
        "no checkpoint": lambda: saved.write_bytes(b"PNG, or whatever"),
        "cannot be loaded safely": lambda: saved.write_bytes(pickle.dumps(Payload())),
        "more than tensors": lambda: torch.save({STATE: Payload()}, saved),
        "lacks a dictionary": lambda: torch.save([1, 2], saved),
        f"lacks {STATE}": lambda: change(saved, **{STATE: None, "Blip2QformerCir": state}),
        "lacks model_config": lambda: change(saved, model_config=None),
        "unknown model argument depth": lambda: change(saved, model_config={"depth": 3}),
        'Missing key(s) in state_dict: "text_proj.weight"': lambda: change(saved, **{STATE: foreign}),
        "size mismatch for temp": lambda: change(saved, **{STATE: {**state, "temp": torch.ones(2)}}),
    }
    for message, spoil in cases.items():
        saved.write_bytes(whole)
        spoil()
        with pytest.raises(InputError) as caught:
            load_checkpoint(saved)
        text = str(caught.value)
        assert message in text, (message, text)
        assert str(saved) in text
        assert "\n" not in text
        assert not (tmp_path / "owned").exists()
