"""Recall by kind of edit in a run's report, against a count over the file of ranks."""

import json
import re
import shutil

import pytest
from helpers.runner import assert_one_clear_line, read_csv, run

from sprc.data.cirr import load_cirr
from sprc.data.edits import read_edits, read_kinds
from sprc.errors import InputError

KINDS = ["color", "shape", "size", "add", "remove", "move", "negation", "counting", "two"]


@pytest.fixture
def copied(data, trained, tmp_path):
    """A run, and data whose annotations may be changed: the run's folder, the data's, its file of edits."""
    shutil.copytree(trained[0], tmp_path / "run")
    for file in ("recall_table.csv", "recall_by_kind.csv"):  # another test's report
        (tmp_path / "run" / file).unlink(missing_ok=True)
    shutil.copytree(data / "cirr_dataset", tmp_path / "data" / "cirr_dataset")
    return tmp_path / "run", tmp_path / "data", tmp_path / "data" / "cirr_dataset" / "edits.val.json"


def report(folder, data, **changes):
    return run("report_run.py", folder, "--data-path", data, "--queries", 1, "--device", "cpu", **changes)


def test_the_report_counts_what_the_file_of_ranks_says_of_each_kind(copied):
    folder, data, file = copied
    edits = json.loads(file.read_text())
    lost = next(kind for kind in KINDS if any(edit["kind"] == kind for edit in edits.values()))
    for edit in edits.values():  # so that a kind has no query
        edit["kind"] = "move" if edit["kind"] == lost else edit["kind"]
    file.write_text(json.dumps(edits))
    stdout, _ = report(folder, data)
    run(
        "blip_validate.py",
        *("--dataset", "CIRR", "--data-path", data, "--save-ranks", folder / "ranks.csv"),
        *("--model-path", folder / "saved_models" / "tuned_clip_arithmetic.pt"),
    )
    of_kind = {}
    for row in read_csv(folder / "ranks.csv"):
        for kind in (edits[row["pairid"]]["kind"], "all"):
            of_kind.setdefault(kind, []).append((int(row["rank"]), int(row["subset_rank"])))
    expected = [kind for kind in (*KINDS, "all") if kind in of_kind]
    assert len(expected) > 3
    assert lost not in expected
    rows = read_csv(folder / "recall_by_kind.csv")
    assert list(rows[0]) == ["kind", "queries", "recall_at1", "recall_at5", "group_recall_at1"]
    assert [row["kind"] for row in rows] == expected
    assert sum(int(row["queries"]) for row in rows[:-1]) == int(rows[-1]["queries"]) == len(edits)
    lines = [line.split() for line in stdout.splitlines()]
    assert ["queries", "R@1", "R@5", "R_s@1"] in lines
    for row in rows:
        ranks = of_kind[row["kind"]]
        assert int(row["queries"]) == len(ranks)
        hits = (
            sum(rank < 1 for rank, _ in ranks),
            sum(rank < 5 for rank, _ in ranks),
            sum(in_set < 1 for _, in_set in ranks),
        )
        found = [float(row[name]) for name in ("recall_at1", "recall_at5", "group_recall_at1")]
        assert found == pytest.approx([100 * count / len(ranks) for count in hits])
        assert [row["kind"], row["queries"], *(f"{value:.1f}" for value in found)] in lines
    whole = read_csv(folder / "recall_table.csv")[0]
    assert whole["query"] == "reference and text"
    assert {name: whole[name] for name in list(rows[-1])[2:]} == {
        name: rows[-1][name] for name in list(rows[-1])[2:]
    }


def test_data_without_edits_have_one_table(copied):
    folder, data, file = copied
    report(folder, data)
    table = (folder / "recall_table.csv").read_bytes()
    (folder / "recall_by_kind.csv").unlink()
    for path in file.parent.glob("edits.*"):
        path.unlink()
    (file.parent / "made_by.json").unlink()
    stdout, _ = report(folder, data)
    assert "kind" not in stdout
    assert not (folder / "recall_by_kind.csv").exists()
    assert (folder / "recall_table.csv").read_bytes() == table


def test_edits_of_other_triplets_stop_the_report_in_one_line(copied):
    folder, data, file = copied
    edits = json.loads(file.read_text())
    first, *_, last = edits
    edits[first]["target"], own = edits[last]["target"], edits[first]["target"]
    file.write_text(json.dumps(edits))
    _, stderr = report(folder, data, code=2)
    message = f"edits.val.json: entry {first}: 'target' names '{edits[last]['target']}', but the triplet's is"
    assert_one_clear_line(stderr, f"{message} '{own}'; make the data again")
    assert not (folder / "recall_table.csv").exists()


def test_a_broken_file_of_edits_is_named(copied):
    _, data, file = copied
    split, whole = load_cirr(data, "val"), json.loads(file.read_text())
    key = str(split.triplets[3].pair_id)
    without = {name: entry for name, entry in whole.items() if name != key}
    for content, message in (
        ('{"1": ', "broken JSON at line 1"),
        ("3", "is not an object of pair ids and edits; make the data again"),
        (json.dumps(list(whole.values())[:2]), f"entry {split.triplets[2].pair_id}: is missing"),
        (json.dumps(without), f"entry {key}: is missing; make the data again"),
        (json.dumps({**without, key: 1}), f"entry {key}: is a int, not an object; make the data again"),
        (
            json.dumps({**without, key: {**whole[key], "kind": "all"}}),
            f"entry {key}: 'kind' is 'all', not one",
        ),
    ):
        file.write_text(content)
        for read in (
            lambda: read_edits(file, split),
            lambda: read_kinds(file, [triplet.pair_id for triplet in split.triplets]),
        ):
            with pytest.raises(InputError, match=re.escape(message)) as caught:
                read()
            assert str(caught.value).startswith(str(file))
