"""Presets: each builds its model, loads its data and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_datasets import write_idx, write_jpeg_archive

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.presets import PRESETS, get_preset
from cocktailsdk.presets.models import CifarResNet, DigitsNet, PadShortcut, ResNet18


def test_models_have_their_published_sizes() -> None:
    def size(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert size(CifarResNet(20)) == 269_722
    assert size(CifarResNet(56)) == 853_018
    assert size(ResNet18()) == 11_173_962
    assert 75_000 < size(DigitsNet()) < 80_000
    assert CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert ResNet18(width=8)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="depth must be 6n \\+ 2"):
        CifarResNet(18)


def test_the_option_a_shortcut_subsamples_and_pads() -> None:
    x = torch.randn(2, 4, 6, 6)
    y = PadShortcut(2, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_the_trained_resnet20_loads_and_classifies(data_folder: Path) -> None:
    from cocktailsdk.presets.datasets import cifar10

    preset = get_preset("cifar10", weights=data_folder / "resnet_cifar10" / "resnet20.safetensors")
    model = preset.build_model().eval()
    _, test = cifar10(data_folder / "cifar10")
    loaders = preset.load(data_folder / "cifar10")
    images, labels = next(iter(loaders.test))
    assert torch.equal(labels, test.labels[: len(labels)])
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    assert right > 0.7  # 0.81 over all 10,000


def test_building_a_model_is_repeatable_and_draws_from_no_global_generator() -> None:
    before = torch.get_rng_state()
    preset = get_preset("digits")
    a, b, c = preset.build_model(3), preset.build_model(3), preset.build_model(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert not torch.equal(a.conv1.weight, c.conv1.weight)


def test_the_digits_preset_trains() -> None:
    net, trainer, loaders = get_preset("digits").prepare(
        epochs=1,
        rounds=cocktail.RoundSettings(count=10, rewind_epoch=0, alphas=(1.0, 0.5)),
        evaluation=cocktail.EvaluationSettings(recalibration_batches=1),
        batches=cocktail.BatchSettings(steps_per_epoch=4),
    )
    assert len(net.names) == 24
    trainer.fit()
    metrics = trainer.evaluate(loaders.test)
    assert list(metrics) == net.names
    assert metrics["dense"] > 0.1


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_the_image_presets_train_a_few_steps(name: str, tmp_path: Path) -> None:
    if name == "cifar10":
        write_jpeg_archive(tmp_path / "train.npz", 60, 0)
        write_jpeg_archive(tmp_path / "test.npz", 20, 1)
    else:
        write_idx(tmp_path, compressed=True, n=60)
    net, trainer, loaders = get_preset(name, epochs_scale=0.001).prepare(
        tmp_path,
        rounds=cocktail.RoundSettings(count=3, merge=False),
        evaluation=cocktail.EvaluationSettings(recalibration_batches=1),
        batches=cocktail.BatchSettings(steps_per_epoch=1),
    )
    trainer.fit()
    assert len(net.names) == 24
    assert sum(len(y) for _, y in loaders.train) == 57  # the last 5 % are held out
    assert sum(len(y) for _, y in loaders.merge) == 3
    assert set(trainer.evaluate(loaders.test, ["dense"])) == {"dense"}


def test_the_image_presets_carry_the_papers_settings() -> None:
    training = get_preset("cifar10").training
    optimizer = training["optimizer"]([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["weight_decay"] == 1e-4
    assert (training["epochs"], training["rounds"].rewind_epoch) == (150, 7)
    short = get_preset("cifar10", epochs_scale=0.1).training
    assert (short["epochs"], short["rounds"].rewind_epoch) == (15, 1)


def test_pretrained_weights_skip_round_zero(tmp_path: Path) -> None:
    model = CifarResNet(20)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    preset = get_preset("cifar10", weights=tmp_path / "weights.safetensors")
    assert preset.training["start"] == "pretrained"
    assert torch.equal(preset.build_model().linear.weight, model.linear.weight)
    with pytest.raises(TrainingError, match=r"does not hold the weights of resnet18"):
        get_preset("cifar10", model="resnet18", weights=tmp_path / "weights.safetensors").build_model()
    with pytest.raises(TrainingError, match="no weights at"):
        get_preset("cifar10", weights=tmp_path / "none").build_model()
    (tmp_path / "bad").write_bytes(b"x" * 20)
    with pytest.raises(TrainingError, match="cannot be read as a safetensors file"):
        get_preset("cifar10", weights=tmp_path / "bad").build_model()


def test_unknown_presets_and_settings_are_named() -> None:
    with pytest.raises(TrainingError, match=r"no preset 'digit' \(did you mean 'digits'\?\): there are digits, "):
        get_preset("digit")
    with pytest.raises(TrainingError, match="'digits' has no setting 'model': it takes none"):
        get_preset("digits", model="resnet20")
    with pytest.raises(TrainingError, match="no model 'vgg': it has resnet20, resnet18"):
        get_preset("cifar10", model="vgg")
    with pytest.raises(TrainingError, match="epochs_scale must be greater than 0"):
        get_preset("cifar10", epochs_scale=0.0)
    assert get_preset("digits", model=None, weights=None).name == "digits"
    assert set(PRESETS) == {"digits", "cifar10", "fashion-mnist"}


def test_data_that_is_needed_or_not_wanted_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"'cifar10' needs the folder that holds its images \(--data PATH\)"):
        get_preset("cifar10").loaders()
    with pytest.raises(TrainingError, match="takes no data folder"):
        get_preset("digits").loaders(tmp_path)


def test_the_digits_are_normalised() -> None:
    images = torch.cat([x for x, _ in get_preset("digits").loaders().merge])
    assert abs(float(images.mean())) < 0.1
    assert abs(float(images.std()) - 1) < 0.1
