"""Training with wrong triplets: the robust loss, and triplets that are made wrong on purpose."""

import pytest
from helpers.runner import assert_one_clear_line, read_csv, train


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
    ],
)
def test_a_wrong_flag_is_one_clear_line(data, tmp_path, flags, message):
    folder, _, stderr = train(data, tmp_path, *flags, code=2)
    assert_one_clear_line(stderr, message)
    assert folder is None
