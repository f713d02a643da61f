"""The losses against loops over the batch, in float64: values and gradients."""

import math

import pytest
import torch
from helpers import plain_model as plain
from torch import Tensor

from sprc.models.losses import align_loss, complementary_loss, contrastive_loss, similarity

pytestmark = pytest.mark.numeric


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    ("batch", "gallery", "tokens"), [(3, 5, 4), (1, 5, 4), (3, 1, 4), (3, 5, 1), (1, 1, 1)]
)
def test_similarity_is_the_largest_token_product(batch: int, gallery: int, tokens: int) -> None:
    queries, targets = leaf(batch, 6, seed=0), leaf(gallery, tokens, 6, seed=1)
    ours = similarity(queries, targets)
    expected = plain.similarities(queries, targets)
    assert ours.shape == (batch, gallery)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = leaf(batch, gallery, seed=2).detach()
    for mine, theirs in zip(
        gradients((ours * upstream).sum(), queries, targets),
        gradients((expected * upstream).sum(), queries, targets),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_contrastive_loss_equals_the_loop(batch: int) -> None:
    queries, targets = leaf(batch, 6, seed=3), leaf(batch, 4, 6, seed=4)
    temp = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    ours = contrastive_loss(queries, targets, temp)
    expected = plain.contrastive_loss(queries, targets, temp)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        gradients(ours, queries, targets, temp), gradients(expected, queries, targets, temp), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_contrastive_loss_has_the_slope_of_its_values() -> None:
    queries, targets = leaf(3, 4, seed=5), leaf(3, 2, 4, seed=6)
    temp = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive_loss, (queries, targets, temp))


def test_contrastive_loss_knows_the_diagonal() -> None:
    # Four targets on four axes. Queries on their own axis score 1 against 0; all on one axis cannot tell.
    axes = torch.eye(4)
    targets, temp = axes[:, None, :], torch.tensor(0.5)
    right = math.log(math.exp(2) + 3) - 2
    assert contrastive_loss(axes, targets, temp).item() == pytest.approx(right, rel=1e-6)
    shifted = contrastive_loss(axes.roll(1, dims=0), targets, temp).item()
    assert shifted == pytest.approx(right + 2, rel=1e-6)
    same = torch.ones(4, 4) / 2
    assert contrastive_loss(same, targets, temp).item() == pytest.approx(math.log(4), rel=1e-6)


def test_contrastive_loss_is_finite_at_a_tiny_temperature() -> None:
    queries, targets = leaf(4, 6, seed=7).detach().float(), leaf(4, 3, 6, seed=8).detach().float()
    assert torch.isfinite(contrastive_loss(queries, targets, torch.tensor(1e-4)))


@pytest.mark.parametrize(("batch", "temp"), [(2, 0.4), (5, 0.4), (6, 3.0), (6, 0.15)])
def test_complementary_loss_equals_the_loop(batch: int, temp: float) -> None:
    queries, targets = leaf(batch, 6, seed=3), leaf(batch, 4, 6, seed=4)
    scale = torch.tensor(temp, dtype=torch.float64, requires_grad=True)
    ours = complementary_loss(queries, targets, scale)
    expected = plain.complementary_loss(queries, targets, scale)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(
        gradients(ours, queries, targets, scale), gradients(expected, queries, targets, scale), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("temp", [0.1, 0.5, 2.0])  # the steep way, both ways, the gentle one
def test_complementary_loss_has_the_slope_of_its_values(temp: float) -> None:
    queries, targets = leaf(4, 4, seed=5), leaf(4, 2, 4, seed=6)
    scale = torch.tensor(temp, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(complementary_loss, (queries, targets, scale))


@pytest.mark.parametrize("temp", [1.0, 0.1, 0.02, 0.01])
def test_complementary_loss_is_right_where_a_negative_has_all_but_nothing_left(temp: float) -> None:
    """Queries on another's axis: p of that negative is 1 to float32 from 1 / temp = 17 on."""
    axes = torch.eye(4).roll(1, dims=0).requires_grad_()
    targets = torch.eye(4)[:, None, :].clone().requires_grad_()
    scale = torch.tensor(temp, requires_grad=True)
    ours = complementary_loss(axes, targets, scale)
    e = math.exp(-1 / temp)  # of each other target, where the wrong one has 1
    right = -math.log(3 * e / (1 + 3 * e)) - 2 * math.log1p(-e / (1 + 3 * e))
    assert ours.item() == pytest.approx(right, rel=1e-6)
    for gradient in gradients(ours, axes, targets, scale):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
    # And where the target has all of it.
    sure = complementary_loss(torch.eye(4).requires_grad_(), targets, scale)
    assert sure.item() == pytest.approx(-3 * math.log1p(-e / (1 + 3 * e)), rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(sure, targets, scale))


def test_complementary_loss_hardly_pulls_to_a_target_that_is_not_believed_in() -> None:
    """Where InfoNCE pulls most."""
    targets, scale = torch.eye(4)[:, None, :], torch.tensor(0.1)
    wrong = torch.eye(4).roll(1, dims=0)
    for loss, strongest in ((complementary_loss, False), (contrastive_loss, True)):
        query = wrong.clone().requires_grad_()
        (gradient,) = gradients(loss(query, targets, scale), query)
        # Not by what pushes the wrong one away: by what pulls the own one near.
        pull = -gradient.diagonal().mean().item()
        assert (pull > 1) == strongest


def test_a_query_without_negatives_has_no_complementary_loss() -> None:
    queries, targets = leaf(1, 6, seed=3), leaf(1, 4, 6, seed=4)
    loss = complementary_loss(queries, targets, torch.tensor(0.1, dtype=torch.float64))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, queries, targets))


def test_complementary_loss_of_a_rank_s_rows_is_its_share_of_the_whole() -> None:
    queries, targets = leaf(6, 5, seed=3), leaf(6, 2, 5, seed=4)
    temp = torch.tensor(0.3, dtype=torch.float64)
    parts = [complementary_loss(queries[first : first + 2], targets, temp, first) for first in (0, 2, 4)]
    whole = complementary_loss(queries, targets, temp)
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_complementary_loss_is_not_rounded_in_mixed_precision() -> None:
    queries, targets = leaf(4, 6, seed=3).detach().float(), leaf(4, 3, 6, seed=4).detach().float()
    temp = torch.tensor(0.05)
    expected = complementary_loss(queries, targets, temp)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(complementary_loss(queries, targets, temp), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_align_loss_equals_the_loop(batch: int) -> None:
    outputs, prompts = leaf(batch, 5, 6, seed=9), leaf(1, 5, 6, seed=10)
    ours = align_loss(outputs, prompts)
    expected = plain.align_loss(outputs, prompts)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *gradients(ours, outputs), *gradients(expected, outputs), rtol=1e-10, atol=1e-12
    )


def test_align_loss_sends_no_gradient_to_the_prompts() -> None:
    outputs, prompts = leaf(2, 5, 6, seed=11), leaf(1, 5, 6, seed=12)
    align_loss(outputs, prompts).backward()
    assert prompts.grad is None
    assert outputs.grad.abs().sum() > 0
