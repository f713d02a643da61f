"""Training with wrong triplets: the robust loss, and triplets that are made wrong on purpose."""

from collections import Counter
from random import Random

import pytest
from helpers.runner import assert_one_clear_line, read_csv, run, train

from sprc.data.cirr import load_cirr
from sprc.data.noise import deranged, make_wrong
from sprc.data.split import Triplet
from sprc.errors import InputError

HUNDRED = [
    Triplet(n, f"r{n}", f"t{n % 40}", f"caption {n}", training_captions=(f"a{n}",)) for n in range(100)
]


def test_the_complementary_losses_have_the_share_that_they_are_given(data, tmp_path):
    flags = ("--contrast", "complementary", "--complementary-weight", 0.75, "--loss-rtc", 0.5)
    (row,) = read_csv(train(data, tmp_path, *flags)[0] / "train_metrics.csv")
    losses = {name: float(value) for name, value in row.items() if name.startswith("loss_")}
    weights = {"loss_itc": 0.25, "loss_rtc": 0.125, "loss_align": 0.4}
    weights |= {"loss_itc_complementary": 0.75, "loss_rtc_complementary": 0.375}
    assert losses.keys() == weights.keys()
    total = sum(weights[name] * loss for name, loss in losses.items())
    assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--complementary-weight", 0.5), "the loss is InfoNCE alone; add --contrast complementary, or"),
        (
            ("--contrast", "complementary", "--complementary-weight", 1.5),
            "--complementary-weight 1.5 must be a number from 0 to 1",
        ),
        (("--noise-ratio", 0.005), "--noise-ratio 0.005 of 144 triplets is 1, too few to change places"),
        (("--noise-ratio", -1), "--noise-ratio -1.0 must be a number from 0 to 1"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(data, tmp_path, flags, message):
    folder, _, stderr = train(data, tmp_path, *flags, code=2)
    assert_one_clear_line(stderr, message)
    assert folder is None


@pytest.mark.parametrize(
    "values", ["abcdef", "aabbccdd", "aaab", "aaaabbbb", "aaabbc", "aaaaabc", "aaaa", "ab", "a"]
)
@pytest.mark.parametrize("seed", range(3))
def test_none_keeps_its_own_but_where_others_are_too_few(values, seed):
    found = deranged(values, Random(seed))
    assert sorted(found) == list(range(len(values)))
    kept = sum(values[place] == values[other] for place, other in enumerate(found))
    most = max(Counter(values).values())
    assert kept == max(0, 2 * most - len(values))


def differing(before, after):
    """The fields in which triplets differ, of those that do."""
    pairs = zip(before, after, strict=True)
    fields = [[name for name in vars(a) if getattr(a, name) != getattr(b, name)] for a, b in pairs]
    return {place: names for place, names in enumerate(fields) if names}


def test_a_share_of_the_targets_change_places():
    wrong, changes = make_wrong(HUNDRED, 0.2, "target", 3)
    found = differing(HUNDRED, wrong)
    assert len(found) == 20
    assert all(names == ["target"] for names in found.values())
    assert Counter(t.target for t in wrong) == Counter(t.target for t in HUNDRED)
    assert [row["number"] for row in changes] == sorted(found)
    for row in changes:
        before, after = HUNDRED[row["number"]], wrong[row["number"]]
        assert (row["pair_id"], row["part"]) == (before.pair_id, "target")
        assert (row["before"], row["after"]) == (before.target, after.target)
    assert make_wrong(HUNDRED, 0.2, "target", 3)[0] == wrong != make_wrong(HUNDRED, 0.2, "target", 4)[0]
    assert make_wrong(HUNDRED, 0, "target", 3) == (HUNDRED, [])
    assert len(differing(HUNDRED, make_wrong(HUNDRED, 1, "target", 3)[0])) == 100


def test_a_mix_changes_references_captions_and_targets_in_a_third_each():
    wrong, changes = make_wrong(HUNDRED, 0.5, "mix", 0)
    found = differing(HUNDRED, wrong)
    fields = {"reference": ["reference"], "caption": ["caption", "training_captions"], "target": ["target"]}
    assert Counter(row["part"] for row in changes) == {"reference": 16, "caption": 17, "target": 17}
    assert {row["number"]: fields[row["part"]] for row in changes} == found
    with pytest.raises(InputError, match=r"--noise-ratio 0.05 of 100 triplets is 5, too few"):
        make_wrong(HUNDRED, 0.05, "mix", 0)


def test_a_run_trains_on_wrong_triplets_writes_them_down_and_goes_on_with_the_same(data, tmp_path):
    flags = ("--noise-ratio", 0.5, "--no-use-gated-fusion")
    whole, stdout, _ = train(data, tmp_path / "whole", *flags, "--num-epochs", 2)
    assert "made wrong: 72 of 144 training triplets" in stdout
    triplets = {t.pair_id: t for t in load_cirr(data, "train").triplets}
    rows = read_csv(whole / "noisy_triplets.csv")
    assert len(rows) == 72
    for row in rows:
        assert row["before"] == triplets[int(row["pair_id"])].target != row["after"]
    part, _, _ = train(data, tmp_path / "part", *flags)
    (part / "noisy_triplets.csv").unlink()  # the run knows them without it
    _, stderr = run("blip_fine_tune_2.py", "--resume", part, "--noise-ratio", 0.2, code=2)
    assert_one_clear_line(stderr, "was started with --noise-ratio 0.5, which cannot change within a run")
    run("blip_fine_tune_2.py", "--resume", part, "--num-epochs", 2)
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
