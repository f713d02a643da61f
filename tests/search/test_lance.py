"""The engine that keeps the pictures' mean features in a table of LanceDB's."""

import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.searching import TEXT, make_index, query, save_model

from sprc.errors import InputError
from sprc.search import indexing, lance
from sprc.search.index import FORMAT, open_index
from sprc.search.searcher import Searcher, SharedSearcher, check_settings
from sprc.search.settings import EngineSettings

pytest.importorskip("lancedb", reason="lancedb is not installed")

REFERENCE = "dev-0-0-img0.png"


@pytest.fixture(scope="module")
def indexed(pictures, checkpoint, tmp_path_factory):
    """Twelve pictures with a table: their folder and their index."""
    folder = tmp_path_factory.mktemp("lance")
    shutil.copytree(pictures / "a", folder / "pictures")
    make_index(folder / "index", folder / "pictures", checkpoint, lancedb=True)
    return folder


@pytest.fixture
def copied(indexed, tmp_path):
    """A copy of the index, to be changed; it says that its pictures are where they were."""
    shutil.copytree(indexed / "index", tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture(scope="module")
def exact(indexed):
    return Searcher.open(indexed / "index", device="cpu")


def opened(exact, index, engine="lancedb"):
    """Open an index anew, with a model that is there."""
    return replace(exact, engine=engine).with_index(open_index(index))


def tables(index):
    return sorted(path.name for path in index.glob("*lance*"))


def names(searcher, top=12):
    return [result.name for result in searcher.search(REFERENCE, TEXT, top=top)]


@contextmanager
def hidden(file, elsewhere):
    """Take a picture away, and bring it back."""
    (elsewhere / "hidden").write_bytes(file.read_bytes())
    file.unlink()
    try:
        yield
    finally:
        shutil.move(elsewhere / "hidden", file)


def write_made_index(path, features):
    """An index of pictures that do not exist: their features (G, Q, E)."""
    path.mkdir()
    (path / "vectors-1.bin").write_bytes(features.tobytes())
    (path / "pooled-1.bin").write_bytes(indexing.mean_features(features).tobytes())
    identity = {"model": "none", "transform": "targetpad", "target_ratio": 1.25}
    told = {"format": FORMAT, "folder": str(path), "identity": identity, "scored_as": {}}
    (path / "index.json").write_text(json.dumps(told | {"shape": features.shape[1:]}))
    entries = [[f"{i:04d}.jpg", [], f"{i:032x}", 0] for i in range(len(features))]
    (path / "pictures.json").write_text(json.dumps({"generation": 1, "pictures": entries, "left_out": {}}))
    return open_index(path)


# --- what is found


def test_with_all_candidates_it_answers_as_exact_search_does(indexed, exact):
    searcher = Searcher.open(indexed / "index", device="cpu", engine="lancedb")
    assert searcher.search(REFERENCE, TEXT, top=12) == exact.search(REFERENCE, TEXT, top=12)
    assert searcher.search(REFERENCE, TEXT, top=3) == exact.search(REFERENCE, TEXT, top=3)


def test_few_candidates_are_those_with_the_nearest_means_ranked_exactly(tmp_path):
    features = np.random.default_rng(0).standard_normal((300, 4, 16)).astype(np.float16)
    features[7] = features[211]  # a tie, which stands in the order of the names
    index = write_made_index(tmp_path / "index", features)
    lance.make_table(index.path, 1, index.pooled.numpy())
    vector = torch.from_numpy(features[211, 0]).float()
    means = features.astype(np.float32).mean(axis=1).astype(np.float16).astype(np.float32)
    nearest = np.argsort(-(means @ vector.numpy()), kind="stable")[:40]
    scores = (features[nearest].astype(np.float32) @ vector.numpy()).max(axis=1)
    wanted = [f"{i:04d}.jpg" for _, i in sorted(zip(-scores, nearest.tolist(), strict=True))]
    assert wanted[:2] == ["0007.jpg", "0211.jpg"]
    searcher = Searcher(index, None, "lancedb", candidates=40)
    assert [result.name for result in searcher.best(vector, 10)] == wanted[:10]
    assert [result.name for result in searcher.best(vector, 40)] == wanted
    assert [result.name for result in searcher.best(vector, 3, [7])] == [wanted[1], *wanted[2:4]]


def test_codes_in_lists_find_what_exact_search_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "LISTED", 500)
    monkeypatch.setattr(lance, "A_LIST", 150)
    random = np.random.default_rng(0)
    centres = random.standard_normal((20, 1, 32))
    features = (centres[random.integers(20, size=600)] + 0.3 * random.standard_normal((600, 2, 32))) / 6
    index = write_made_index(tmp_path / "index", features.astype(np.float16))
    lance.make_table(index.path, 1, index.pooled.numpy())
    assert len(lance.open_table(index).list_indices()) == 1
    exact, searcher = Searcher(index, None), Searcher(index, None, "lancedb", candidates=100)
    found = wanted = 0
    for row in range(0, 600, 30):
        vector = index.gallery[row, 0].float()
        best = {result.name for result in exact.best(vector, 10)}
        found += len(best & {result.name for result in searcher.best(vector, 10)})
        wanted += len(best)
    assert found >= 0.95 * wanted


# --- the table and the index


def test_a_table_follows_its_index_until_it_is_told_to_go(indexed, copied, exact, checkpoint, capsys):
    folder = indexed / "pictures"
    assert tables(copied) == ["lance-1"]
    made = (copied / "lance-1").stat().st_mtime_ns
    make_index(copied, folder, checkpoint)  # nothing to do
    assert (copied / "lance-1").stat().st_mtime_ns == made
    shared = SharedSearcher(copied, device="cpu", engine="lancedb")
    asked, not_yet = shared.current(), opened(exact, copied)
    before = names(asked)
    added = shutil.copy(folder / before[0], folder / "added.png")
    try:
        capsys.readouterr()
        make_index(copied, folder, checkpoint)
        assert (
            "13 pictures (1 new, 0 changed, 0 removed since the last run; 0 computed)"
            in capsys.readouterr().out
        )
        assert tables(copied) == ["lance-2"]
        # Who had it open finds what it held, and who opens it now what it holds.
        assert names(asked) == names(not_yet) == before
        assert set(names(shared.current(), 13)) == {*before, "added.png"}
    finally:
        Path(added).unlink()
    make_index(copied, folder, checkpoint, lancedb=False)
    assert tables(copied) == []
    with pytest.raises(
        InputError, match=r"has no table of LanceDB's; run `search.py index` again with --lancedb"
    ):
        Searcher.open(copied, device="cpu", engine="lancedb")
    make_index(copied, folder, checkpoint)
    assert tables(copied) == []


@pytest.mark.parametrize("step", ["_schema", "_to_disk", "rename", "_finish", "remove_tables"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_index(
    indexed, copied, exact, checkpoint, tmp_path, monkeypatch, step
):
    class Killed(BaseException):
        """Nothing catches it."""

    def die(*_, **__):
        raise Killed

    folder = indexed / "pictures"
    old = names(opened(exact, copied, "exact"))
    with hidden(folder / old[0], tmp_path), monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", die)
        elif step == "remove_tables":  # the second time, at the end
            own, calls = lance.remove_tables, []
            patch.setattr(lance, step, lambda *a: calls.append(a) or (own(*a) if len(calls) < 2 else die()))
        else:
            patch.setattr(indexing if step == "_finish" else lance, step, die)
        with pytest.raises(Killed):
            make_index(copied, folder, checkpoint)
    new = names(opened(exact, copied, "exact"))
    assert names(opened(exact, copied)) == new
    assert set(new) == set(old[1:] if step == "remove_tables" else old)
    # The next run is of other pictures than the one that was killed: its table must not be that one's.
    with hidden(folder / old[1], tmp_path):
        make_index(copied, folder, checkpoint)
    after = names(opened(exact, copied))
    assert after == names(opened(exact, copied, "exact"))
    assert set(after) == {name for name in old if name != old[1]}
    assert tables(copied) == [f"lance-{open_index(copied).generation}"]


def test_a_damaged_table_is_refused_and_made_again(indexed, copied, exact, checkpoint):
    for file in (copied / "lance-1").rglob("*.lance"):
        if file.is_file():
            file.write_bytes(b"no table")
    with pytest.raises(InputError, match=r"lance-1 is damaged .*; remove it, and run `search.py index` with"):
        names(opened(exact, copied))
    shutil.rmtree(copied / "lance-1")
    make_index(copied, indexed / "pictures", checkpoint, lancedb=True)
    assert names(opened(exact, copied)) == names(opened(exact, copied, "exact"))


def test_a_table_that_goes_while_it_is_read_leaves_exact_search(exact, copied):
    class Unreadable:
        def search(self, *_, **__):
            raise RuntimeError("Object at location lance-1 not found\nand where")

    searcher = opened(exact, copied)
    vars(searcher._engine)["_table"] = Unreadable()
    with pytest.raises(InputError, match=r"is damaged \(Object at location lance-1 not found\); remove it"):
        names(searcher)
    shutil.rmtree(copied / "lance-1")
    assert names(searcher) == names(exact)


def test_another_model_is_refused_and_rebuilt_with_its_table(indexed, copied, data, tmp_path):
    other = save_model(tmp_path / "other.pt", data, 1)
    with pytest.raises(InputError, match="was made by another model"):
        make_index(copied, indexed / "pictures", other, lancedb=True)
    with pytest.raises(InputError, match="was made by another model"):
        query(copied, model_path=other, engine="lancedb", image=REFERENCE)
    assert tables(copied) == ["lance-1"]
    make_index(copied, indexed / "pictures", other, rebuild=True)  # it throws all of the old one away
    assert tables(copied) == []


def test_a_missing_package_is_named_before_the_work(indexed, copied, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    monkeypatch.setattr(indexing, "picture_features", None)  # it must not come that far
    told = r"needs the package lancedb: pip install -e '\.\[lancedb\]'"
    with pytest.raises(InputError, match=told):
        check_settings(EngineSettings(engine="lancedb"))
    with pytest.raises(InputError, match=told):
        make_index(copied, indexed / "pictures", checkpoint)
    assert tables(copied) == ["lance-1"]


def test_a_full_disk_is_said_in_one_line(indexed, copied, checkpoint, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    shutil.rmtree(copied / "lance-1")
    monkeypatch.setattr(lance, "_to_disk", full)
    with pytest.raises(InputError, match=r"--lancedb: the table cannot be written in .*No space left"):
        make_index(copied, indexed / "pictures", checkpoint, lancedb=True)
    assert tables(copied) == []
