"""A checkpoint rebuilds its model with no flag, and anything else is refused in one line."""

import math
import pickle
from dataclasses import asdict

import pytest
import torch
from helpers.small_models import CAPTIONS, random_images, randomise, small_config

from sprc.config import ModelConfig, read_backbone
from sprc.errors import InputError
from sprc.models import checkpoint, device, factory
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import STATE, load_checkpoint, save_checkpoint, start_model
from sprc.models.factory import create_model, tokenizer_of
from sprc.models.switches import SWITCHES
from sprc.models.tokenizer import SPECIAL_TOKENS, WordPiece

HYPERPARAMETERS = {"blip_model_name": "blip2_cir_align_prompt", "backbone": "tiny", "seed": 3}


@pytest.fixture
def model(tokenizer):
    config = small_config(fusion_strategy="weighted", pool="all", freeze_vit=False)
    model = Blip2QformerCirAlignPrompt(config, tokenizer)
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


def flip_a_bit(path):
    """In the middle of the weights: torch loads such a file without a word."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def test_whatever_is_no_checkpoint_of_this_model_is_refused_in_one_line(model, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = saved.read_bytes()
    state = model.state_dict()
    contents = torch.load(saved, weights_only=True)
    words, config = contents["vocabulary"], contents["model_config"]
    foreign = {key: value for key, value in state.items() if "text_proj" not in key} | {"x": torch.ones(1)}
    cases = {
        "does not exist; give a checkpoint": lambda: saved.unlink(),
        "cut short": lambda: saved.write_bytes(whole[: len(whole) // 2]),
        "no checkpoint": lambda: saved.write_bytes(b"PNG, or whatever"),
        "cannot be loaded safely": lambda: saved.write_bytes(pickle.dumps(Payload())),
        "more than tensors": lambda: torch.save({STATE: Payload()}, saved),
        "lacks a dictionary": lambda: torch.save([1, 2], saved),
        f"lacks {STATE}": lambda: change(saved, **{STATE: None, "Blip2QformerCir": state}),
        "lacks model_config": lambda: change(saved, model_config=None),
        "vocab_size=22, but its vocabulary makes 23": lambda: change(saved, vocabulary=[*words, "more"]),
        "vocabulary is not one of words": lambda: change(saved, vocabulary=[*words[:-1], 3]),
        "too few for its depths": lambda: change(saved, model_config={**config, "vit_depth": 10**9}),
        "is cut short, or holds": lambda: flip_a_bit(saved),
        "unknown model argument 0": lambda: change(saved, model_config={**config, 0: 1}),
        "norm_eps=nan must be a finite": lambda: change(saved, model_config={**config, "norm_eps": math.nan}),
        "norm_eps=1000": lambda: change(saved, model_config={**config, "norm_eps": 10**400}),
        "does not fit into memory": lambda: change(saved, model_config={**config, "embed_dim": 10**12}),
        "unknown model argument depth": lambda: change(saved, model_config={"depth": 3}),
        "text_proj.bias, text_proj.weight; 1 unexpected: x)": lambda: change(saved, **{STATE: foreign}),
        "1 of another shape: temp": lambda: change(saved, **{STATE: {**state, "temp": torch.ones(2)}}),
        "holds entries that are no tensors: ['temp']": lambda: change(saved, **{STATE: {**state, "temp": 1}}),
        "has a wrong epoch": lambda: change(saved, epoch="last"),
        "its hyperparameters lack backbone": lambda: change(saved, hyperparameters={}),
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


# Published SPRC checkpoints, and files without the frozen ViT. The backbone's files are made, and local.

YAML = {"vit": "https://weights.example/vit.pth", "blip2": "https://weights.example/blip2.pth"}


@pytest.fixture
def backbone(tokenizer, monkeypatch):
    """A frozen backbone `pretrain` of small widths; returns its files by address."""
    config = small_config(freeze_vit=True, use_gated_fusion=False)
    source = Blip2QformerCirAlignPrompt(config, tokenizer)
    randomise(source, seed=4)
    vit = {
        key.removeprefix("visual_encoder."): v for key, v in source.state_dict().items() if "visual" in key
    }
    files = {YAML["vit"]: vit, YAML["blip2"]: {"model": source.state_dict()}}
    values = {key: value for key, value in asdict(config).items() if not key.startswith("use_")}
    recipe = {"model": values, "weights": YAML}
    monkeypatch.setattr(factory, "_read", lambda address, _: files[address])
    monkeypatch.setattr(checkpoint, "read_backbone", lambda name: recipe)
    monkeypatch.setattr(checkpoint, "tokenizer_of", lambda *_: tokenizer)
    return files


def published(path, tokenizer, depth=3, **changes):
    """A file as SPRC's scripts write it: plain SPRC, the ViT in half precision, old position ids."""
    model = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=False, vit_depth=depth), tokenizer)
    randomise(model, seed=2)
    state = model.state_dict()
    state = {key: value.half() if "visual" in key else value for key, value in state.items()}
    state |= {"Qformer.bert.embeddings.other.position_ids": torch.arange(9)[None], **changes}
    torch.save({"epoch": 9, STATE: {key: v for key, v in state.items() if v is not None}}, path)
    return model


def test_a_published_checkpoint_scores_as_plain_sprc(backbone, tokenizer, tmp_path):
    path = tmp_path / "sprc.pt"
    model = published(path, tokenizer)
    loaded = load_checkpoint(path, backbone="pretrain")
    assert loaded.found == f"{path}: plain SPRC, epoch 9; fusion is off for scoring"
    assert not loaded.model.config.use_gated_fusion
    for key, value in model.state_dict().items():
        expected = value.half().float() if "visual" in key else value
        assert torch.equal(loaded.model.state_dict()[key], expected), key


def test_a_published_checkpoint_without_position_ids_loads(backbone, tokenizer, tmp_path):
    path = tmp_path / "sprc.pt"
    published(path, tokenizer, **{"Qformer.bert.embeddings.position_ids": None})
    ids = load_checkpoint(path, backbone="pretrain").model.Qformer.bert.embeddings.position_ids
    assert torch.equal(ids, torch.arange(ids.shape[1])[None])


def test_a_published_checkpoint_starts_a_training_with_new_fusion_or_none(backbone, tokenizer, tmp_path):
    path = tmp_path / "sprc.pt"
    model = published(path, tokenizer)
    fused = load_checkpoint(path, backbone="pretrain", switches={"use_gated_fusion": True})
    assert fused.found.endswith("plain SPRC, epoch 9; gated fusion is newly started")
    assert fused.model.gated_fusion is not None
    assert torch.equal(fused.model.text_proj.weight, model.text_proj.weight)
    plain = load_checkpoint(path, backbone="pretrain", switches={"use_gated_fusion": False})
    assert plain.found.endswith("fusion is off")
    assert plain.model.gated_fusion is None


@pytest.mark.parametrize(
    ("switches", "start", "text"),
    [
        ({}, "random", "embeddings"),
        ({"fusion_strategy": "cross"}, "identity", "embeddings"),
        ({"fusion_strategy": "select"}, "identity", "contextual"),
        ({"fusion_strategy": "cross", "fusion_start": "random"}, "random", "embeddings"),
    ],
    ids=str,
)
def test_a_new_fusion_starts_in_its_own_way(backbone, tokenizer, tmp_path, switches, start, text):
    """Whatever the run that the checkpoint is of, which had no fusion, says of one."""
    plain = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=False), tokenizer)
    assert plain.config.fusion_start == "random"
    told = {"backbone": "pretrain", "blip_model_name": "blip2_cir_align_prompt"}
    save_checkpoint(tmp_path / "plain.pt", plain, 3, told, full=True)
    switches = {"use_gated_fusion": True, **switches}
    model = load_checkpoint(tmp_path / "plain.pt", switches=switches).model
    assert (model.config.fusion_start, model.config.fusion_text) == (start, text)
    assert (start == "identity") == (model.gated_fusion.delta_mlp.last.weight.abs().sum() == 0)


def test_a_published_checkpoint_needs_its_backbone_and_all_its_parameters(backbone, tokenizer, tmp_path):
    path = tmp_path / "sprc.pt"
    published(path, tokenizer)
    with pytest.raises(InputError, match="does not say which backbone it was trained on; pass --backbone"):
        load_checkpoint(path)
    published(path, tokenizer, temp=None, extra=torch.ones(1))
    with pytest.raises(InputError, match=r"\(1 missing: temp; 1 unexpected: extra\)"):
        load_checkpoint(path, backbone="pretrain")


def frozen_model(tokenizer, backbone):
    model = Blip2QformerCirAlignPrompt(small_config(freeze_vit=True), tokenizer)
    randomise(model, seed=3)
    model.visual_encoder.load_state_dict(backbone[YAML["vit"]])
    return model


def test_a_frozen_vit_is_left_out_and_comes_back_from_its_backbone(backbone, tokenizer, tmp_path):
    model, path = frozen_model(tokenizer, backbone), tmp_path / "ours.pt"
    save_checkpoint(path, model, 1, {**HYPERPARAMETERS, "backbone": "pretrain"})
    contents = torch.load(path, weights_only=True)
    assert not [key for key in contents[STATE] if key.startswith("visual_encoder.")]
    assert contents["left_out"]["backbone"] == "pretrain"
    loaded = load_checkpoint(path).model
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("depth", [2, 5])
def test_a_checkpoint_s_own_depth_decides_and_is_named(backbone, tokenizer, tmp_path, depth):
    path, ours = tmp_path / "sprc.pt", tmp_path / "ours.pt"
    published(path, tokenizer, depth)
    named = f"; its vision transformer has {depth} blocks, that of pretrain has 3"
    for switches in (None, {"use_gated_fusion": True}):
        loaded = load_checkpoint(path, backbone="pretrain", switches=switches)
        assert loaded.found.endswith(named)
        assert loaded.model.config.vit_depth == len(loaded.model.visual_encoder.blocks) == depth
    save_checkpoint(ours, loaded.model, 1, {**HYPERPARAMETERS, "backbone": "pretrain"}, full=True)
    again = load_checkpoint(ours)
    assert again.found.endswith(named)
    assert again.model.config == loaded.model.config


def test_ours_of_another_depth_takes_that_many_blocks_of_its_backbone(backbone, tokenizer, tmp_path):
    path = tmp_path / "ours.pt"
    model = Blip2QformerCirAlignPrompt(small_config(freeze_vit=True, vit_depth=2), tokenizer)
    model.visual_encoder.load_state_dict(backbone[YAML["vit"]], strict=False)
    save_checkpoint(path, model, 1, {**HYPERPARAMETERS, "backbone": "pretrain"})
    loaded = load_checkpoint(path)
    assert loaded.found.endswith("; its vision transformer has 2 blocks, that of pretrain has 3")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_a_resumed_run_keeps_the_depth_that_it_was_started_with():
    told = ("blip2_cir_align_prompt", "tiny")
    begun = start_model(*told, switches={}).config
    assert begun.vit_depth == 2
    recorded = asdict(begun) | {"vit_depth": 1}
    assert start_model(*told, switches={}, recorded=recorded).config.vit_depth == 1


def clip_vit_l_shapes(depth):
    """Names and shapes of CLIP's ViT-L/14 at 224 pixels, the first ``depth`` of its blocks."""
    width = 1024
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (257, width),
        "conv1.weight": (width, 3, 14, 14),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
    }
    linear = {
        "attn.out_proj": (width, width),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    for prefix in (f"transformer.resblocks.{block}." for block in range(depth)):
        shapes |= {
            f"{prefix}attn.in_proj_weight": (3 * width, width),
            f"{prefix}attn.in_proj_bias": (3 * width,),
        }
        for name, shape in linear.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[prefix + name] = (width,)
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()}


@pytest.mark.filterwarnings("ignore:for .*meta")
@pytest.mark.parametrize("switches", [None, {"use_gated_fusion": True}], ids=["to score", "to train"])
@pytest.mark.parametrize("depth", [23, 21])
def test_a_published_vit_l_checkpoint_loads(tmp_path, monkeypatch, depth, switches):
    """23 blocks, as SPRC builds it; 21 as LAVIS 1.0.2 does. True shapes, each of one number, repeated."""
    words = [*SPECIAL_TOKENS, *(f"word{number}" for number in range(30522 - len(SPECIAL_TOKENS)))]
    monkeypatch.setattr(checkpoint, "tokenizer_of", lambda *_: WordPiece(words))
    config = ModelConfig(**{**read_backbone("pretrain_vitL")["model"], "use_gated_fusion": False})
    assert config.vit_depth == 23
    path = tmp_path / "sprc_vitL.pt"
    with torch.device("meta"):
        own = Blip2QformerCirAlignPrompt(config, range(30523)).state_dict()
    shapes = {key: value.shape for key, value in own.items() if not key.startswith("visual_encoder.")}
    shapes |= clip_vit_l_shapes(depth)
    state = {key: torch.ones(()).expand(shape) for key, shape in shapes.items()}
    torch.save({"epoch": 9, STATE: state}, path)
    with torch.device("meta"):
        loaded = load_checkpoint(path, backbone="pretrain_vitL", switches=switches)
    assert len(loaded.model.visual_encoder.transformer["resblocks"]) == depth
    named = f"its vision transformer has {depth} blocks, that of pretrain_vitL has 23"
    assert (named in loaded.found) == (depth != 23)


def test_half_precision_of_the_vit_is_the_same_backbone(backbone, tokenizer, tmp_path):
    model, path = frozen_model(tokenizer, backbone), tmp_path / "ours.pt"
    device.halve_frozen_vit(model)  # as on a GPU
    save_checkpoint(path, model, 1, {**HYPERPARAMETERS, "backbone": "pretrain"})
    load_checkpoint(path)


def test_another_backbone_than_the_trained_one_is_refused(backbone, tokenizer, tmp_path):
    model, path = frozen_model(tokenizer, backbone), tmp_path / "ours.pt"
    save_checkpoint(path, model, 1, {**HYPERPARAMETERS, "backbone": "pretrain"})
    full = tmp_path / "full.pt"
    save_checkpoint(full, model, 1, {**HYPERPARAMETERS, "backbone": "pretrain"}, full=True)
    backbone[YAML["vit"]]["cls_token"] = backbone[YAML["vit"]]["cls_token"] + 0.1
    with pytest.raises(InputError, match="was trained on another pretrain backbone than the one in"):
        load_checkpoint(path)
    loaded = load_checkpoint(full).model  # holds its own, and needs none
    assert torch.equal(loaded.visual_encoder.cls_token, model.visual_encoder.cls_token)


def test_names_that_contradict_the_file_are_refused(saved):
    with pytest.raises(
        InputError, match=r"--backbone 'coco', but .* says 'tiny'; leave the flag out or give tiny"
    ):
        load_checkpoint(saved, backbone="coco")
    with pytest.raises(InputError, match="--blip-model-name 'other', but"):
        load_checkpoint(saved, model_name="other")


# A state dict alone, as SPRC's scripts save it from the registered class.


def bare(path, model):
    torch.save({"epoch": 2, STATE: model.state_dict()}, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "all", "num_query_tokens": 7, "max_txt_len": 11, "num_heads": 2},
        {"fusion_text": "contextual", "fusion_strategy": "additive", "cross_attention_every": 1},
        {"fusion_strategy": "select", "fusion_top_k": 2, "fusion_width": 12},
        {"fusion_strategy": "film", "image_size": 20, "vit_depth": 2, "num_layers": 3, "alpha_init": 0.25},
    ],
)
def test_a_fusion_s_state_dict_alone_rebuilds_its_model(backbone, tokenizer, tmp_path, changes):
    """The backbone `pretrain` has other values for all of these."""
    model = Blip2QformerCirAlignPrompt(small_config(**changes), tokenizer).eval()
    randomise(model, seed=5)
    loaded = load_checkpoint(bare(tmp_path / "theirs.pt", model), backbone="pretrain")
    assert "SPRC with gated fusion, epoch 2" in loaded.found
    assert "does not say" not in loaded.found
    assert loaded.model.config == model.config
    targets, references = model.extract_target_features(random_images(3, model.config))
    same_targets, same_references = loaded.model.extract_target_features(random_images(3, model.config))
    assert torch.equal(
        model.inference(references, targets, CAPTIONS),
        loaded.model.inference(same_references, same_targets, CAPTIONS),
    )


def test_a_plain_state_dict_s_shapes_give_its_sizes(backbone, tokenizer, tmp_path):
    changes = {"num_query_tokens": 7, "embed_dim": 6, "image_size": 20, "vit_depth": 2, "num_layers": 3}
    changes |= {"cross_attention_every": 1, "max_positions": 40, "intermediate_size": 24}
    config = small_config(**changes, use_gated_fusion=False, freeze_vit=True)
    model = Blip2QformerCirAlignPrompt(config, tokenizer)
    assert not [key for key in model.state_dict() if "fusion" in key]
    assert load_checkpoint(bare(tmp_path / "theirs.pt", model), backbone="pretrain").model.config == config


def test_a_fusion_s_state_dict_without_switches_is_named(backbone, tokenizer, tmp_path):
    model = Blip2QformerCirAlignPrompt(small_config(freeze_vit=True), tokenizer)
    state = {key: value for key, value in model.state_dict().items() if key != SWITCHES}
    torch.save({"epoch": 2, STATE: state}, tmp_path / "theirs.pt")
    loaded = load_checkpoint(tmp_path / "theirs.pt", backbone="pretrain")
    assert "it does not say its fusion's switches: taken are pool=masked and fusion_text" in loaded.found


def test_a_checkpoint_without_the_switches_entry_is_the_same(model, saved):
    contents = torch.load(saved, weights_only=True)
    assert contents[STATE].pop(SWITCHES).dtype == torch.uint8
    torch.save(contents, saved)
    loaded = load_checkpoint(saved)
    assert loaded.model.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    model.load_state_dict(contents[STATE])  # as a resumed training does


@pytest.mark.parametrize(
    "entry",
    [
        torch.ones(3),
        torch.zeros((), dtype=torch.uint8),
        torch.tensor([123, 34], dtype=torch.uint8),
        torch.tensor(list(b"[" * 100000), dtype=torch.uint8),
        torch.tensor(list(b'{"model_config": 1, "vocabulary": "a"}'), dtype=torch.uint8),
        torch.tensor(list(b'{"model_config": {"pool": 1}, "vocabulary": "a"}'), dtype=torch.uint8),
        torch.tensor(list(b'{"model_config": {"depth": 1}, "vocabulary": "a"}'), dtype=torch.uint8),
    ],
)
def test_a_broken_switches_entry_is_one_clear_line(backbone, tokenizer, tmp_path, entry):
    path = tmp_path / "theirs.pt"
    state = Blip2QformerCirAlignPrompt(small_config(freeze_vit=True), tokenizer).state_dict()
    torch.save({"epoch": 2, STATE: state | {SWITCHES: entry}}, path)
    with pytest.raises(InputError, match=r"cannot be read; it is damaged|pool=1 has type|does not hold them"):
        load_checkpoint(path, backbone="pretrain")


def test_tiny_s_words_come_back_for_a_state_dict_alone_or_are_refused(tmp_path):
    for switches in ({}, {"use_gated_fusion": False}):
        model = create_model(Blip2QformerCirAlignPrompt, "tiny", **switches)
        loaded = load_checkpoint(bare(tmp_path / "theirs.pt", model), backbone="tiny").model
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert loaded.config == model.config
    own = read_backbone("tiny")["model"]
    words = list(tokenizer_of("tiny").get_vocab())[:-1]  # without [DEC]
    renamed = ["zzz" if word == "circle" else word for word in words]
    for vocabulary, switches in ((words[:40], {"use_gated_fusion": False}), (renamed, {})):
        count = len(vocabulary) + 1
        config = ModelConfig(**{**own, "vocab_size": count, **switches})
        model = Blip2QformerCirAlignPrompt(config, WordPiece(vocabulary))
        with pytest.raises(InputError, match=rf"has {count} words and does not hold them"):
            load_checkpoint(bare(tmp_path / "theirs.pt", model), backbone="tiny")
