"""The classifier head after training: which layer it is, whose it is, and what becomes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_pretrained import pretrained, recipe
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import TinyNet, tiny_images, tiny_loaders, tiny_net, to_float

import cocktailsdk as cocktail
from cocktailsdk.presets.datasets import TensorLoader
from cocktailsdk.training import refit
from cocktailsdk.training.head_fit import HardLoss

X = torch.zeros(2, 1, 8, 8)


def run(model: nn.Module, head: str, **options: Any) -> cocktail.CoTrainer:
    net = cocktail.sparsify(model, ("unstructured", "n:m", "channel"), (X,))
    trainer = pretrained(net, recipe=recipe(refit_head=head), **options)
    trainer.fit()
    return trainer


def head_of(net: cocktail.CocktailNet, name: str) -> Tensor:
    with net.using(name):
        return net.model.fc.weight.detach().clone()


@pytest.fixture(scope="module")
def own() -> cocktail.CoTrainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyNet()
    return run(model, "own", total_steps=60)


def test_every_subnetwork_has_a_head_of_its_own_that_its_mask_masks(own: cocktail.CoTrainer) -> None:
    net = own.net
    assert len(net.private) > len(net.names) // 3  # some keep the trained one
    heads = [head_of(net, name) for name in net.names]
    assert len({tuple(head.flatten().tolist()) for head in heads}) > len(heads) // 3
    for name in net.private:
        masks = net.mask_tensors(name)
        if "fc.weight" in masks:
            assert not head_of(net, name)[(masks["fc.weight"] == 0).expand(4, 16)].any()


def test_heads_go_with_bundles_and_slim_models(own: cocktail.CoTrainer, tmp_path: Path) -> None:
    net = own.net
    net.save_pretrained(tmp_path)
    again = cocktail.from_pretrained(tmp_path, TinyNet())
    x = torch.stack([batch[0][0] for batch in tiny_loaders()[1]])
    for name in ("unstructured@0.893", "2:4", "channel@0.41"):
        with net.using(name), again.using(name), torch.no_grad():
            net.model.eval(), again.model.eval()
            masked = net.model(x)
            assert torch.equal(masked, again.model(x))
        with torch.no_grad():
            torch.testing.assert_close(net.slim(name).eval()(x), masked, rtol=1e-4, atol=1e-5)


def test_the_head_of_a_later_run_starts_from_shared_weights(own: cocktail.CoTrainer) -> None:
    net = own.net
    trainer = pretrained(net, recipe=recipe(refit_head="none"), total_steps=4)
    trainer.fit()
    assert not net.private


def test_a_shared_head_costs_no_bytes() -> None:
    trainer = run(TinyNet(), "shared")
    assert not trainer.net.private
    none = run(TinyNet(), "none")
    assert trainer.parameters_stored == none.parameters_stored


@pytest.mark.parametrize(("width", "expected"), [(64, True), (1, False)])
def test_by_default_heads_are_owned_where_they_are_small(width: int, expected: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32 * width), nn.ReLU(), nn.Linear(32 * width, 16))
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).relu())

    net = cocktail.sparsify(Net(), (cocktail.Unstructured(sparsities=[0.2, 0.5, 0.8]), "n:m"), (X,))
    loader = TensorLoader(tiny_images(64), 8, to_float)
    pretrained(net, recipe=recipe(), total_steps=4, recalibration_batches=8, train_loader=loader).fit()
    assert bool(net.private) is expected


def why_not(model: nn.Module, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=refit.__name__):
        run(model, "own", total_steps=4, **options)
    return caplog.text


def test_layers_that_cannot_be_refitted_stay_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class ConvHead(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn3(self.conv3(F.relu(self.bn1(self.conv1(x))))))
            return self.fc(x.mean((2, 3), keepdim=True)).flatten(1)

    class Scaled(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Tied(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(16, 4)
            self.again.weight = self.fc.weight

    frozen = TinyNet()
    frozen.fc.requires_grad_(False)
    assert "no nn.Linear returns the logits" in why_not(ConvHead(), caplog)
    assert "no nn.Linear returns the logits" in why_not(Scaled(), caplog)
    assert "'fc' is frozen" in why_not(frozen, caplog)
    assert "tied" in why_not(Tied(), caplog)


def test_a_refitted_head_has_a_lower_loss_on_training_batches() -> None:
    """For the networks that were trained least, on the data that all of them were trained on."""
    losses = {}
    for head in ("none", "own"):
        net = tiny_net()
        pretrained(net, recipe=recipe(refit_head=head), total_steps=30, recalibration_batches=12).fit()
        with torch.no_grad():
            net.model.eval()
            batches = [batch for _ in range(3) for batch in tiny_loaders()[0]]
            for name in net.names:
                with net.using(name):
                    mean = torch.stack([F.cross_entropy(net.model(x), y) for x, y in batches]).mean()
                losses.setdefault(name, []).append(float(mean))
    before, after = (sum(values) for values in zip(*losses.values(), strict=True))
    assert after < before


def test_a_dense_network_that_lost_accuracy_is_named(caplog: pytest.LogCaptureFixture) -> None:
    net = tiny_net()
    train, held_out = tiny_loaders()
    cocktail.CoTrainer(net, train, F.cross_entropy, val_loader=held_out, total_steps=100).fit()
    assert net.metrics["dense"] > 0.9
    wrong = [(x, (y + 1) % 4) for x, y in train]
    with caplog.at_level(logging.INFO):
        pretrained(net, total_steps=60, recipe=recipe(refit_head="none", distill=False), train_loader=wrong).fit()
    assert "the dense network's accuracy fell from" in caplog.text
    assert "PassAllocation(dense=0.4)" in caplog.text


class Loose(nn.Module):
    """Features without convolutions, and a head that is called in the way that a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.fc = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.body(x.flatten(1))))


def test_a_head_that_is_called_by_keyword_is_refitted() -> None:
    class Named(Loose):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.features(x))

    assert run(Named(), "own", total_steps=20).net.private


def test_a_head_that_sees_examples_twice_stays_and_the_run_ends_well(caplog: pytest.LogCaptureFixture) -> None:
    class Twice(Loose):
        def forward(self, x: Tensor) -> Tensor:
            if self.norm.training:
                self.fc(self.features(x) * 0)
            return super().forward(x)

    assert "did not call its head once" in why_not(Twice(), caplog)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_head_with_a_frozen_parameter_stays(frozen: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Loose()
    getattr(model.fc, frozen).requires_grad_(False)
    before = getattr(model.fc, frozen).clone()
    assert "'fc' is frozen" in why_not(model, caplog)
    assert torch.equal(getattr(model.fc, frozen), before)


def test_a_head_whose_weight_is_computed_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = Loose()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.fc)  # type: ignore[no-untyped-call]
    assert "computed from other parameters" in why_not(model, caplog)


RARE = torch.tensor([1.0, 1.0, 1.0, 20.0])


def focal(output: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def test_by_default_a_head_is_not_fitted_with_another_loss_than_the_users(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=refit.__name__):
        run(Loose(), "auto", total_steps=4, loss_fn=focal)
    assert "the loss is not the mean cross-entropy" in caplog.text


def test_a_head_is_fitted_with_the_users_class_weights() -> None:
    """A class that counts twenty times as much is predicted more often than with equal weights."""

    def predicted(loss_fn: nn.Module) -> int:
        torch.manual_seed(0)
        trainer = run(Loose(), "shared", total_steps=4, loss_fn=loss_fn, learning_rate=1e-6, optimizer=None)
        with torch.no_grad():
            outputs = [trainer.net.model.eval()(x) for x, _ in tiny_loaders()[1]]
        return int((torch.cat(outputs).argmax(1) == 3).sum())

    with torch.random.fork_rng(devices=[]):
        assert predicted(nn.CrossEntropyLoss()) < predicted(nn.CrossEntropyLoss(weight=RARE))


def test_a_head_of_double_precision_that_stays_keeps_every_bit() -> None:
    model = Loose().double()
    layer = refit.Layer("fc", model.fc, HardLoss())
    assert torch.equal(layer.trained()["fc.weight"], model.fc.weight)


def test_by_default_a_head_is_not_fitted_to_a_handful_of_examples(caplog: pytest.LogCaptureFixture) -> None:
    for batches, refitted in ((2, False), (8, True)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=refit.__name__):
            loader = TensorLoader(tiny_images(64), 8, to_float)
            run(Loose(), "auto", total_steps=4, recalibration_batches=batches, train_loader=loader)
        assert ("16 labels in 2 training batches" not in caplog.text) is refitted


def test_weights_that_guess_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pretrained(tiny_net(), total_steps=2).fit()
    assert "which is chance for 4 classes: load the trained weights before sparsify()" in caplog.text
