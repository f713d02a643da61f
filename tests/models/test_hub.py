"""Models as folders and on the model hub, against a stand-in of it on the loopback."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.model_hub import Hub, commit_of
from helpers.runner import run
from helpers.searching import make_index, save_model, save_reranker
from PIL import Image

import sprc
from sprc.errors import InputError
from sprc.models import published
from sprc.models.checkpoint import load_checkpoint, read_contents, start_model
from sprc.models.model_card import results_text
from sprc.models.model_path import folder_beside, named_model
from sprc.models.reranker import load_reranker
from sprc.run_folder import name_of_checkpoint
from sprc.scoring.exporting import export_model
from sprc.scoring.retriever import Retriever
from sprc.scoring.settings import ExportSettings, ValidationSettings
from sprc.scoring.validation import run_validation
from sprc.training.resume import absolute_paths

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
from huggingface_hub import constants, file_download

try:
    from huggingface_hub.utils import reset_sessions
except ImportError:  # from version 1 on
    from huggingface_hub.utils import close_session as reset_sessions

TEXT = "make it red"
PICTURES = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]


@pytest.fixture(scope="module")
def retriever(checkpoint):
    return sprc.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def folder(retriever, tmp_path_factory):
    return retriever.save_pretrained(tmp_path_factory.mktemp("saved") / "some" / "model")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, in the place of the hub for this process; its cache is new."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the tries of a download
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "good")
    reset_sessions()
    yield server
    reset_sessions()
    server.shutdown()
    server.server_close()


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same_answers(one, other):
    assert torch.equal(one.encode_query(PICTURES[0], TEXT), other.encode_query(PICTURES[0], TEXT))
    assert torch.equal(one.encode_document(PICTURES), other.encode_document(PICTURES))


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the folder


def test_a_saved_model_is_four_files_and_scores_as_before(retriever, folder):
    assert sorted(files_of(folder)) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    again = sprc.load(folder, device="cpu")
    same_answers(again, retriever)
    assert again.checkpoint.epoch == retriever.checkpoint.epoch == 3
    assert (folder / "vocab.txt").read_text().split("\n")[:1] == ["[PAD]"]
    config = json.loads((folder / "config.json").read_text())
    told = (config["model_type"], config["backbone"], config["preprocessing"]["transform"])
    assert told == ("blip2_cir_align_prompt", "tiny", "targetpad")
    assert len({oct(file.stat().st_mode) for file in folder.iterdir()}) == 1


@pytest.mark.parametrize("full", [False, True])
def test_a_frozen_vit_is_left_out_unless_it_is_asked_for(retriever, tmp_path, full):
    from safetensors import safe_open

    retriever.save_pretrained(tmp_path, save_full=full)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    own = set(retriever.model.state_dict())
    vit = {name for name in own if name.startswith("visual_encoder.")}
    assert names == (own if full else own - vit)
    same_answers(sprc.load(tmp_path, device="cpu"), retriever)


def test_a_vit_that_is_not_the_backbone_s_is_not_left_out(retriever, tmp_path):
    state = dict(retriever.model.state_dict())
    state["visual_encoder.cls_token"] = state["visual_encoder.cls_token"] + 1
    state = {name: value for name, value in state.items() if "gated_fusion" not in name}
    torch.save({"epoch": 1, "Blip2QformerCirAlignPrompt": state}, tmp_path / "theirs.pt")
    other = sprc.load(tmp_path / "theirs.pt", backbone="tiny", device="cpu")
    message = refused(lambda: other.save_pretrained(tmp_path / "out"))
    assert "cannot be left out" in message
    assert "--save-full" in message
    assert not (tmp_path / "out").exists()
    same_answers(sprc.load(other.save_pretrained(tmp_path / "out", save_full=True), device="cpu"), other)


def test_a_folder_of_the_former_format_still_loads(checkpoint, retriever, tmp_path):
    (tmp_path / "model.pt").write_bytes(checkpoint.read_bytes())
    same_answers(sprc.load(tmp_path, device="cpu"), retriever)


def test_a_failed_save_leaves_what_was_there(retriever, folder, monkeypatch, tmp_path):
    retriever.save_pretrained(tmp_path)
    before = files_of(tmp_path)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match=r"model\.safetensors \(No space left on device\); free some space"):
        retriever.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def spoil(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_what_is_damaged_or_no_model_is_refused_in_one_line(folder, tmp_path):
    for name, content in files_of(folder).items():
        (tmp_path / name).write_bytes(content)
    weights, config, words = (tmp_path / name for name in ("model.safetensors", "config.json", "vocab.txt"))
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    cases = {
        "model.safetensors is not the file": lambda: weights.write_bytes(flipped),
        "vocab.txt is not the file": lambda: words.write_text("other\n"),
        "vocab.txt is missing": words.unlink,
        "config.json is missing": config.unlink,
        "config.json cannot be read as JSON": lambda: config.write_text("{"),
        "is not this project's: it has no model_config": lambda: config.write_text('{"model_type": "bert"}'),
        "has format 2, and this version reads 1": lambda: spoil(config, lambda c: c.update(format=2)),
        "has no sha256": lambda: spoil(config, lambda c: c.pop("sha256")),
        "hyperparameters lack backbone": lambda: spoil(
            config, lambda c: c["hyperparameters"].pop("backbone")
        ),
        "has a wrong epoch": lambda: spoil(config, lambda c: c.update(epoch="last")),
    }
    for message, break_it in cases.items():
        for name, content in files_of(folder).items():
            (tmp_path / name).write_bytes(content)
        break_it()
        assert message in refused(lambda: sprc.load(tmp_path, device="cpu")), message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "weights.ckpt"])
def test_a_folder_with_a_pickle_alone_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"what could run")
    (tmp_path / "config.json").write_text("{}")
    message = refused(lambda: sprc.load(tmp_path))
    assert f"holds {name} and no model.safetensors; a pickle can run code" in message


# --- the card


def test_the_card_s_snippet_runs(folder, monkeypatch, capsys):
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    for name in ("reference.jpg", "a.jpg", "b.jpg"):
        PICTURES[name == "b.jpg"].save(folder.parent / name)
    monkeypatch.chdir(folder.parent)
    exec(code, {})
    assert re.match(r"tensor\(\[\[-?\d\.\d+, -?\d\.\d+\]\]\)", capsys.readouterr().out)


def test_the_card_says_of_a_run_what_its_folder_says(trained, tmp_path):
    import yaml

    run = trained[0]
    sprc.load(run, device="cpu").save_pretrained(tmp_path / "one")
    sprc.load(tmp_path / "one", device="cpu").save_pretrained(tmp_path / "two")  # without the run's folder
    rows = [line.split(",") for line in (run / "validation_metrics.csv").read_text().splitlines()]
    epoch = str(torch.load(run / "saved_models/tuned_clip_arithmetic.pt", weights_only=True)["epoch"])
    (row,) = (row for row in rows if row[0] == epoch)
    for name in ("one", "two"):
        card = (tmp_path / name / "README.md").read_text()
        _, metadata, text = card.split("---\n", 2)
        told = yaml.safe_load(metadata)
        assert told["datasets"] == ["cirr"]
        assert "composed-image-retrieval" in told["tags"]
        (result,) = told["model-index"][0]["results"]
        assert result["dataset"]["split"] == "val"
        found = {one["name"]: one["value"] for one in result["metrics"]}
        assert found == {n: round(float(v), 2) for n, v in zip(rows[0][1:], row[1:], strict=True)}
        for part in (
            "- seed: 0",
            f"torch {torch.__version__}",
            "validation split (val)",
            f"| recall_at1 | {float(row[rows[0].index('recall_at1')]):.2f} |",
            "What it cannot do",
            "recipe: none",
        ):
            assert part in text, part
        (command,) = re.findall(r"```sh\n  (python .*)\n", text)
        words = shlex.split(command)[2:]
        given = dict(zip(words, [*words[1:], None], strict=True))
        assert {n: given[n] for n in ("--loss-align", "--loss-rtc", "--num-epochs")} == {
            "--loss-align": "0.4",
            "--loss-rtc": "0.4",
            "--num-epochs": "2",
        }
        assert {"--save-best", "--save-training"} <= set(words)
        assert "--seed" not in words  # it was not given


def test_the_card_names_the_recipe(trained, tmp_path):
    stage = tmp_path / "my recipe" / "second"
    shutil.copytree(trained[0], stage / trained[0].name)
    told = {"start": "first", "flags": {"negatives": "bank"}}
    (stage / "stage.json").write_text(json.dumps(told))
    sprc.load(stage / trained[0].name, device="cpu").save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert '- recipe: `my recipe`, stage `second`, from the stage `first`: `{"negatives": "bank"}`' in text


def test_figures_on_fashioniq_name_their_gallery():
    told = {"dataset": "fashioniq", "backbone": "pretrain", "fiq_protocol": "val-split"}
    text = results_text(told, {"metrics": {"average_recall_at10": 61.239}}, None)
    assert "each type in its own gallery (val-split protocol), the reference left in" in text
    assert "| average_recall_at10 | 61.24 |" in text


def test_what_no_run_says_is_unknown_and_not_invented(retriever, folder, tmp_path):
    text = (folder / "README.md").read_text()
    assert "Data set, command, seed and versions are unknown" in text
    assert "Recall is unknown" in text
    assert "model-index" not in text


def test_a_published_checkpoint_s_figures_are_told_as_its_authors(retriever, tmp_path, monkeypatch):
    entry = replace(published.published_as("sprc-cirr"), backbone="tiny")
    monkeypatch.setattr(published, "PUBLISHED", (entry,))
    state = {name: v for name, v in retriever.model.state_dict().items() if "gated_fusion" not in name}
    torch.save({"epoch": 1, "Blip2QformerCirAlignPrompt": state}, tmp_path / "sprc_cirr.pt")
    model = sprc.load(tmp_path / "sprc_cirr.pt", device="cpu")
    text = (model.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert "As its authors published them, not measured here: in percent, CIRR's test split" in text
    assert "| recall_at1 | 51.96 |" in text
    assert "model-index" not in text


# --- what --model-path takes


def test_a_folder_and_a_run_s_folder_do_as_model_path(folder, trained, data, pictures, tmp_path, capsys):
    recall = run_validation(
        ValidationSettings(dataset="CIRR", data_path=data, model_path=folder, device="cpu", num_workers=0)
    )
    assert "model.safetensors: SPRC with gated fusion, epoch 3" in capsys.readouterr().out
    assert 0 < recall["recall_at50"] <= 100
    make_index(tmp_path / "index", pictures, folder)
    assert len(sprc.Searcher.open(tmp_path / "index", device="cpu").search(PICTURES[0], TEXT, top=3)) == 3
    assert named_model(trained[0]) == trained[0] / "saved_models" / "tuned_clip_arithmetic.pt"
    assert named_model(folder) == folder / "model.safetensors"
    assert name_of_checkpoint(folder / "model.safetensors") == folder.name
    assert named_model(Path("nothing.pt")) == Path("nothing.pt")  # who opens it says that it is missing


def test_a_training_starts_from_a_name(hub, folder, tmp_path):
    hub.models["user/model"] = [files_of(folder)]
    flags = absolute_paths({"model_path": Path("user/model"), "data_path": Path("user/model")})
    assert flags["data_path"] == Path.cwd() / "user/model"
    assert flags["model_path"].name == "model.safetensors"
    assert flags["model_path"].parent.name == commit_of(0)
    assert name_of_checkpoint(flags["model_path"]) == "user--model"
    start = start_model("blip2_cir_align_prompt", "tiny", model_path=flags["model_path"], switches={})
    assert torch.equal(start.text_proj.weight, load_checkpoint(folder).model.text_proj.weight)


# --- export_model.py


def test_the_script_writes_what_load_reads(checkpoint, retriever, tmp_path):
    stdout, _ = run("export_model.py", "--model-path", checkpoint, "--out", tmp_path / "out", "--save-full")
    assert stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    same_answers(Retriever.from_pretrained(tmp_path / "out", device="cpu"), retriever)


def test_a_re_ranker_is_exported_and_re_ranks_as_before(checkpoint, tmp_path):
    model = save_reranker(tmp_path / "second.pt", checkpoint)
    export_model(ExportSettings(model_path=tmp_path / "second.pt", out=tmp_path / "out"))
    first = load_checkpoint(checkpoint).model
    again = load_reranker(tmp_path / "out", first)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--rerank out\n" in card
    assert "It scores nothing alone" in card
    assert "holds a re-ranker" in refused(lambda: sprc.load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"revision": "next"}, "--revision next is about the model hub; give --push-to"),
        ({"push_to": "a/b/c"}, "--push-to 'a/b/c' is no name of the model hub; give USER/NAME"),
        ({"private": True}, "--private is about the model hub"),
        ({"out": Path(__file__)}, "is a file; give a folder"),
        ({"model_path": Path("nothing.pt")}, "nothing.pt does not exist"),
        ({"transform": "round"}, "round"),
    ],
)
def test_wrong_flags_are_one_line(checkpoint, tmp_path, flags, message):
    settings = ExportSettings(**{"model_path": checkpoint, "out": tmp_path / "out", **flags})
    assert message in refused(lambda: export_model(settings))
    assert not (tmp_path / "out").exists()


# --- the hub


def test_a_pushed_model_comes_back_by_its_name_and_revision(
    hub, checkpoint, retriever, data, tmp_path, capsys
):
    export_model(
        ExportSettings(model_path=checkpoint, out=tmp_path / "out", push_to="user/model", private=True)
    )
    assert f"pushed: {hub.address}/user/model/" in capsys.readouterr().out
    assert hub.private == {"user/model"}
    assert 'sprc.load("user/model")' in hub.models["user/model"][-1]["README.md"].decode()
    other = sprc.load(save_model(tmp_path / "other.pt", data, 7), device="cpu")
    other.push_to_hub("user/model")
    same_answers(sprc.load("user/model", device="cpu"), other)
    same_answers(sprc.load("user/model", revision=commit_of(1), device="cpu"), retriever)
    # As a script's --model-path, which is a path by then.
    assert load_checkpoint(Path("user/model")).epoch == 3


def test_what_was_fetched_is_there_offline_and_what_was_not_is_told(hub, folder, retriever, monkeypatch):
    hub.models["user/model"] = [files_of(folder)]
    same_answers(sprc.load("user/model", device="cpu"), retriever)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()  # which look at it when they are made
    asked = len(hub.asked)
    same_answers(sprc.load("user/model", device="cpu"), retriever)
    message = refused(lambda: sprc.load("user/other"))
    assert "user/other cannot be fetched: HF_HUB_OFFLINE is set and it is not in" in message
    message = refused(lambda: retriever.push_to_hub("user/model"))
    assert "cannot be uploaded: HF_HUB_OFFLINE is set and there is no network" in message
    assert len(hub.asked) == asked


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, folder, retriever, monkeypatch):
    whole = files_of(folder)
    hub.models |= {"user/model": [whole], "user/pickle": [{"config.json": whole["config.json"]}]}
    hub.models["user/pickle"][0] |= {"vocab.txt": b"", "pytorch_model.bin": b"what could run"}
    hub.models |= {"user/empty": [{"README.md": b""}], "user/private": [whole], "user/bert": [{**whole}]}
    hub.models["user/bert"][0]["config.json"] = b'{"model_type": "bert"}'
    hub.private.add("user/private")
    cases = {
        "user/none": f"{hub.address} has no such model, or it is private; correct the name, or log in",
        "user/pickle": "it has no model.safetensors; safetensors alone are taken",
        "user/empty": "it has no config.json",
        "user/bert": "is not this project's",
    }
    for name, message in cases.items():
        assert message in refused(lambda name=name: sprc.load(name)), name
    message = refused(lambda: sprc.load("user/model", revision="v9"))
    assert "it has no revision 'v9'; give a branch, a tag or a commit" in message
    assert "no name of the model hub" in refused(lambda: sprc.load(folder, revision="main"))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    for call in (lambda: sprc.load("user/model"), lambda: retriever.push_to_hub("user/model")):
        message = refused(call)
        assert (
            f"{hub.address} does not know the token; log in with `hf auth login`, or set HF_TOKEN" in message
        )
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.status = 503
    assert "answered 503" in refused(lambda: sprc.load("user/model"))
    hub.status = 403
    assert "the token may not do that" in refused(lambda: retriever.push_to_hub("user/model"))
    assert hub.models["user/model"] == [whole]


def test_a_cut_connection_is_one_line_and_the_next_try_goes_on(hub, folder, retriever):
    hub.models["user/model"] = [files_of(folder)]
    hub.cut_after = 100_000
    message = refused(lambda: sprc.load("user/model"))
    assert "user/model cannot be fetched" in message
    assert "the connection was cut" in message
    assert "run the same again, and it goes on" in message
    hub.cut_after = None
    same_answers(sprc.load("user/model", device="cpu"), retriever)


def test_a_hub_that_is_not_there_is_one_line(hub, retriever):
    hub.shutdown()
    hub.server_close()
    for call in (lambda: sprc.load("user/model"), lambda: retriever.push_to_hub("user/model")):
        assert "cannot be reached" in refused(call)


def test_the_mixin_s_own_verb_reads_a_folder_and_the_hub(hub, folder):
    from sprc.models.hub_model import HubModel

    hub.models["user/model"] = [files_of(folder)]
    expected = read_contents(folder / "model.safetensors")
    for found in (HubModel.from_pretrained("user/model"), HubModel.from_pretrained(folder)):
        assert found.saved.contents["hyperparameters"] == expected["hyperparameters"]


def test_what_is_made_of_a_model_never_lies_in_the_hub_s_cache(tmp_path):
    run, cached = tmp_path / "run", tmp_path / "cache" / "model.safetensors"
    run.mkdir()
    assert folder_beside(run, run / "saved_models" / "best.pt") == run / "saved_models"
    assert folder_beside(Path("someone/model"), cached) == Path()
