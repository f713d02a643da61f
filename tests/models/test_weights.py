"""A backbone's file in torch's cache is whole and the one that loaded before, or is refused in one line."""

import errno
import json
import os
import pickle
import urllib.error

import pytest
import torch
from helpers.small_models import small_config

from sprc.errors import InputError
from sprc.models import factory, weights
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.weights import read_weights

URL = "https://weights.example/folder/backbone.pth"


class Payload:
    def __reduce__(self):
        return open, ("owned", "w")


def saved(path, contents, *, legacy=False):
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch's cache, empty. What the network gives is what ``served`` says."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    serve(monkeypatch, OSError("the network was asked"))
    return folder


def serve(monkeypatch, answer):
    def download(url, path, **_):
        assert url == URL
        if isinstance(answer, Exception):
            raise answer
        with open(path, "wb") as file:
            file.write(answer)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)


@pytest.fixture
def good(tmp_path):
    """Large enough for a flip in the middle to be in the numbers."""
    state = {"weight": torch.arange(5000.0), "bias": torch.ones(3)}
    kinds = {"archive": False, "legacy": True}
    return {name: saved(tmp_path / name, state, legacy=legacy) for name, legacy in kinds.items()}


def flipped(content):
    content = bytearray(content)
    content[len(content) // 2] ^= 1
    return bytes(content)


def refused(*parts):
    with pytest.raises(InputError) as caught:
        read_weights(URL)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert "\n" not in text
    assert "weights_only" not in text  # torch's advice is to switch safety off
    return text


BAD = {
    "empty": (lambda good: b"", "is empty"),
    "web page": (lambda good: b"\n<!DOCTYPE html><html>Log in</html>", "is a web page"),
    "cut archive": (lambda good: good["archive"][:-300], "damaged or cut short"),
    "half an archive": (lambda good: good["archive"][: len(good["archive"]) // 2], "damaged or cut short"),
    "flipped archive": (lambda good: flipped(good["archive"]), "damaged or cut short"),
    "cut legacy": (lambda good: good["legacy"][:-300], "cut short"),
    "noise": (lambda good: b"\x01noise" * 100, "no file of weights"),
    "pickle": (lambda good: pickle.dumps(Payload()), "more than tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_in_the_cache_is_one_line_that_says_to_delete_it(hub, good, case):
    content, message = BAD[case]
    (hub / "backbone.pth").write_bytes(content(good))
    text = refused(message, str(hub / "backbone.pth"), "delete it, and it is fetched again", URL)
    assert "cannot fetch" not in text
    assert [path.name for path in hub.iterdir()] == ["backbone.pth"]
    assert not (hub.parent.parent / "owned").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_holds_code_is_not_run(hub, tmp_path, legacy):
    saved(hub / "backbone.pth", {"weight": Payload()}, legacy=legacy)
    refused("holds more than tensors", "delete it")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["archive", "legacy"])
@pytest.mark.parametrize("keep_times", [False, True])
def test_flipped_bytes_and_other_weights_are_found_after_the_first_load(
    hub, good, tmp_path, kind, keep_times
):
    file = hub / "backbone.pth"
    other = saved(
        tmp_path / "other", {"weight": torch.zeros(5000), "bias": torch.ones(3)}, legacy=kind == "legacy"
    )
    file.write_bytes(good[kind])
    status = file.stat()
    assert torch.equal(read_weights(URL)["weight"], torch.arange(5000.0))
    read_weights(URL)
    for content in (flipped(good[kind]), other, other[:-8]):
        file.write_bytes(content)
        if keep_times:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        refused(str(file))
    file.write_bytes(good[kind])
    assert torch.equal(read_weights(URL)["weight"], torch.arange(5000.0))


def test_a_replaced_file_is_taken_once_the_record_is_deleted(hub, good, tmp_path):
    file = hub / "backbone.pth"
    file.write_bytes(good["archive"])
    read_weights(URL)
    saved(file, {"weight": torch.zeros(2)})
    refused("is not the file that loaded here before", "delete backbone.pth.sprc.json")
    (hub / "backbone.pth.sprc.json").unlink()
    assert torch.equal(read_weights(URL)["weight"], torch.zeros(2))


def test_an_archive_is_hashed_once_and_again_where_its_times_changed(hub, good, monkeypatch):
    hashed = []
    own = weights.hash_file
    monkeypatch.setattr(weights, "hash_file", lambda path, kind: hashed.append(path) or own(path, kind))
    file = hub / "backbone.pth"
    file.write_bytes(good["archive"])
    for times in (1, 1):
        read_weights(URL)
        assert len(hashed) == times
    os.utime(file, ns=(1, 1))
    read_weights(URL)
    read_weights(URL)
    assert len(hashed) == 2
    read_weights(URL, verify=False)
    assert len(hashed) == 2
    file.write_bytes(good["legacy"])
    (hub / "backbone.pth.sprc.json").unlink()
    read_weights(URL)
    read_weights(URL)
    assert len(hashed) == 4


def test_a_damaged_record_says_what_to_delete(hub, good):
    (hub / "backbone.pth").write_bytes(good["archive"])
    for damaged in ("", "[]", '{"size": "x"}', "\x00"):
        (hub / "backbone.pth.sprc.json").write_text(damaged)
        refused("backbone.pth.sprc.json is damaged; delete it")


def test_what_is_fetched_is_whole_or_is_not_kept(hub, good, monkeypatch):
    for answer, message in (
        (b"", "is empty"),
        (b"<html>proxy</html>", "is a web page"),
        (good["archive"][:-9], "cut short"),
    ):
        serve(monkeypatch, answer)
        refused(
            f"what {URL} gives {message}" if message != "cut short" else message, "download it by hand to"
        )
        assert list(hub.iterdir()) == []
    serve(monkeypatch, good["archive"])
    assert torch.equal(read_weights(URL)["weight"], torch.arange(5000.0))
    assert sorted(path.name for path in hub.iterdir()) == ["backbone.pth", "backbone.pth.sprc.json"]
    record = json.loads((hub / "backbone.pth.sprc.json").read_text())
    assert record["size"] == len(good["archive"])


def test_a_file_deleted_and_fetched_again_may_be_another(hub, good, monkeypatch):
    serve(monkeypatch, good["archive"])
    read_weights(URL)
    (hub / "backbone.pth").unlink()
    serve(monkeypatch, good["legacy"])
    read_weights(URL)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space there, or set TORCH_HOME"),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "set TORCH_HOME to another folder, or download it by hand",
        ),
        (urllib.error.URLError("no network"), "cannot fetch https://weights.example/folder/backbone.pth"),
    ],
)
def test_a_fetch_that_fails_says_what_to_do_and_leaves_nothing(hub, monkeypatch, error, message):
    serve(monkeypatch, error)
    refused(message)
    assert list(hub.iterdir()) == []


def test_a_read_only_cache_works_and_says_that_nothing_is_recorded(hub, good, read_only, capsys):
    (hub / "backbone.pth").write_bytes(good["archive"])
    read_only(hub)
    read_weights(URL)
    assert "the checksum of backbone.pth is not recorded" in capsys.readouterr().out
    assert [path.name for path in hub.iterdir()] == ["backbone.pth"]
    (hub / "backbone.pth").read_bytes()


WRONG_CONTENTS = {
    "list": ([torch.ones(2)], "holds no dictionary of weights"),
    "flat": ({"weight": torch.ones(2)}, "has no entry 'model' with weights (it has: weight)"),
    "no dictionary in it": ({"model": torch.ones(2)}, "has no entry 'model' with weights"),
    "no tensors": ({"model": {"a": 1, "b": torch.ones(2)}}, "holds entries that are no tensors (a)"),
    "no names": ({"model": {3: torch.ones(2)}}, "holds entries that are no tensors (3)"),
    "positions": ({"model": {"visual_encoder.pos_embed": torch.ones(1, 8, 24)}}, "is no square of patches"),
    "other parameters": ({"model": {"weight": torch.ones(2)}}, "does not fit this model"),
}


@pytest.mark.parametrize("case", WRONG_CONTENTS)
def test_contents_that_are_no_backbone_s_are_named(hub, tokenizer, case):
    contents, message = WRONG_CONTENTS[case]
    saved(hub / "backbone.pth", contents)
    model = Blip2QformerCirAlignPrompt(small_config(), tokenizer)
    with pytest.raises(InputError) as caught:
        factory.load_backbone(model, {"blip2": URL})
    assert message in str(caught.value)
    assert "backbone.pth" in str(caught.value)
