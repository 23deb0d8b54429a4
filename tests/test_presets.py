"""Presets: each builds its model, loads its data and trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_datasets import write_idx, write_jpeg_archive
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.presets import PRESETS, get_preset
from cocktailsdk.presets.models import CifarResNet, DigitsNet, PadShortcut, ResNet18
from cocktailsdk.presets.weights import load_weights


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


def test_weights_start_the_recipe_for_trained_weights_with_a_few_epochs_in_all(tmp_path: Path) -> None:
    model = CifarResNet(20)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    preset = get_preset("cifar10", weights=tmp_path / "weights.safetensors")
    assert preset.training == {"start": "pretrained", "epochs": 5}
    assert torch.equal(preset.build_model().linear.weight, model.linear.weight)
    assert get_preset("cifar10", weights="w.pth", epochs_scale=2.0).training["epochs"] == 10
    rounds = get_preset("cifar10", weights="w.pth", recipe="cocktail").training
    assert (rounds["start"], rounds["recipe"], rounds["epochs"]) == ("pretrained", "cocktail", 150)
    scratch = get_preset("cifar10", weights="w.pth", start="scratch").training
    assert (scratch["recipe"], scratch["rounds"].rewind_epoch) == ("paper", 7)
    with pytest.raises(TrainingError, match=r"start='pretrained' needs the trained weights: give weights"):
        get_preset("digits", start="pretrained")


def test_digits_from_trained_weights_train_all_networks_in_one_round(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": get_preset("digits").build_model(7).state_dict()}, tmp_path / "weights.pth")
    preset = get_preset("digits", weights=tmp_path / "weights.pth")
    net, trainer, _ = preset.prepare(
        epochs=1,
        evaluation=cocktail.EvaluationSettings(recalibration_batches=1),
        batches=cocktail.BatchSettings(steps_per_epoch=30),
    )
    trainer.fit()
    assert trainer.configuration["training"]["recipe"]["name"] == "pretrained"
    assert [r.networks for r in trainer.history.rounds] == [net.names[1:]]
    assert trainer.history.steps == 30


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"epoch": 3, "state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
        lambda state: {**state, "epoch": 3, "note": "best so far"},
    ],
    ids=[
        "state dict",
        "of DDP",
        "of compiled DDP",
        "under model",
        "under model_state_dict",
        "before 0.4.1",
        "beside an epoch",
    ],
)
def test_checkpoints_are_read_in_the_forms_that_training_scripts_write(
    wrap: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path
) -> None:
    trained = CifarResNet(20).state_dict()
    torch.save(wrap(trained), tmp_path / "weights.pth")
    model = get_preset("cifar10", weights=tmp_path / "weights.pth").build_model()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


class NeedsCode:
    """Pickled by name, so that loading it would run code."""


def test_weights_that_do_not_fit_are_refused_with_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refusal(content: object, **settings: str) -> str:
        torch.save(content, path)
        with pytest.raises(TrainingError) as error:
            get_preset("cifar10", weights=path, **settings).build_model()
        assert len(str(error.value).splitlines()) == 1
        return str(error.value).replace(str(path), "FILE")

    state = CifarResNet(20).state_dict()
    other = refusal(state, model="resnet18")
    assert other.startswith("FILE does not hold the weights of resnet18: ")
    assert other.endswith("Give the weights of a resnet18, or choose its model (--model resnet20)")
    assert "linear.bias is missing" in refusal({k: v for k, v in state.items() if k != "linear.bias"})
    assert "fc.weight is unknown" in refusal({**state, "fc.weight": torch.zeros(2)})
    assert "linear.bias has the shape [100], not [10]" in refusal({**state, "linear.bias": torch.zeros(100)})
    assert "NaN or infinite, in linear.bias" in refusal({**state, "linear.bias": torch.full((10,), torch.nan)})
    assert "holds no state dict, but a dict with the keys epoch" in refusal({"epoch": 3})
    assert "holds no state dict, but list" in refusal([1, 2])
    code = refusal(NeedsCode())
    assert "needs code to be read (test_presets.NeedsCode)" in code
    assert "torch.save(model.state_dict(), 'weights-weights.pth')" in code
    whole = refusal(CifarResNet(20))
    assert "needs code to be read (cocktailsdk.presets.models.CifarResNet)" in whole
    for name, said in {
        "none.safetensors": "no weights at",
        "bad.safetensors": "cannot be read as a safetensors file",
        "bad.pt": "cannot be read as a PyTorch checkpoint",
        "bad.bin": "weights are read from .safetensors, .pth, .pt files",
    }.items():
        if name.startswith("bad"):
            (tmp_path / name).write_bytes(b"x" * 20)
        with pytest.raises(TrainingError, match=said):
            get_preset("cifar10", weights=tmp_path / name).build_model()


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x02q", b"PK\x03\x04broken", bytes(range(256))])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_files_of_weights_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="cannot be read as a"):
        load_weights(nn.Linear(1, 1), path, "a model")


def test_unknown_presets_and_settings_are_named() -> None:
    with pytest.raises(TrainingError, match=r"no preset 'digit' \(did you mean 'digits'\?\): there are digits, "):
        get_preset("digit")
    with pytest.raises(TrainingError, match="'digits' has no setting 'model': it takes weights, start, recipe"):
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
