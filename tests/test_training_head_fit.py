"""A classifier head fitted to features: a convex problem with a check on examples that it was not fitted to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cocktailsdk.training.head_fit import RIDGE, Features, Head, fit_head, head_loss

CLASSES, WIDTH = 4, 12


def problem(n: int = 400, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around a mean for each class."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return means[labels] + noise * torch.randn(n, WIDTH, generator=generator), labels


def untrained(bias: bool = True) -> Head:
    weight = 0.1 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))
    return Head(weight, torch.zeros(CLASSES) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_the_fitted_head_is_the_minimum(bias: bool) -> None:
    inputs, labels = problem()
    teacher = torch.randn(400, CLASSES, generator=torch.Generator().manual_seed(3))
    trained, features = untrained(bias), Features(inputs, labels, teacher)
    head = fit_head(trained, [features], 0.5)
    assert head is not None
    assert (head.bias is None) is not bias
    weight = head.weight.clone().requires_grad_()
    loss = head_loss(Head(weight, head.bias), features, 0.5) + RIDGE * (weight - trained.weight).pow(2).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.norm() < 1e-3 < head_loss(trained, features, 0.5) - loss


def test_it_predicts_new_examples_better() -> None:
    head = fit_head(untrained(), [Features(*problem(noise=1.5), None)], 0.5)
    assert head is not None
    inputs, labels = problem(1000, noise=1.5, seed=7)
    before, after = (float((h(inputs).argmax(1) == labels).float().mean()) for h in (untrained(), head))
    assert before + 0.05 < after


def test_a_head_that_few_examples_cannot_determine_is_refused() -> None:
    inputs, labels = problem(400)
    good = fit_head(untrained(), [Features(inputs, labels, None)], 0.0)
    assert good is not None
    few = torch.randint(0, CLASSES, (16,), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(2))
    assert fit_head(good, [Features(noise, few, good(noise).detach())], 1.0) is None  # already the teacher
    assert fit_head(good, [Features(inputs[:1], labels[:1], None)], 0.0) is None


def test_masked_weights_of_the_head_have_no_part_in_it() -> None:
    inputs, labels = problem()
    mask = (torch.arange(CLASSES * WIDTH).view(CLASSES, WIDTH) % 3 > 0).float()
    trained = untrained()
    head = fit_head(trained, [Features(inputs, labels, None, mask)], 0.0)
    assert head is not None
    assert torch.equal(head.weight[mask == 0], trained.weight[mask == 0])
    assert not torch.equal(head.weight[mask == 1], trained.weight[mask == 1])


def test_one_head_for_several_networks_has_the_least_mean_loss() -> None:
    networks = [Features(*problem(noise=1.5, seed=seed), None) for seed in (0, 1)]
    shared = fit_head(untrained(), networks, 0.0)
    alone = fit_head(untrained(), networks[:1], 0.0)
    assert shared is not None
    assert alone is not None

    def mean(head: Head) -> float:
        return float(torch.stack([head_loss(head, one, 0.0) for one in networks]).mean())

    assert mean(shared) < mean(alone)
    assert head_loss(alone, networks[0], 0.0) < head_loss(shared, networks[0], 0.0)


def test_features_that_are_not_finite_leave_the_trained_head() -> None:
    inputs, labels = problem()
    inputs[3, 2] = torch.nan
    assert fit_head(untrained(), [Features(inputs, labels, None)], 0.0) is None
