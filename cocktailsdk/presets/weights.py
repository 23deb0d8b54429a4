"""Trained weights from a file: safetensors, or what ``torch.save`` wrote, without running any code in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..io.tensors import READ_ERRORS, read_tensors

__all__ = ["SUFFIXES", "load_weights"]

SUFFIXES = (".safetensors", ".pth", ".pt")
"""Of files that weights are read from."""
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts store the state dict, beside the optimizer and the epoch."""
PREFIXES = ("module.", "_orig_mod.")
"""Put before every name by ``DistributedDataParallel`` and by ``torch.compile``."""


def load_weights(model: nn.Module, path: Path, name: str, others: Sequence[str] = ()) -> None:
    """Load a file's weights into a model.

    Args:
        model: It is new: after an error, a part of its weights may be the file's.
        path: A ``.safetensors`` file; or a ``.pth`` or ``.pt`` file that holds a state dict, or a dict with one under
            ``"state_dict"``, ``"model_state_dict"`` or ``"model"``.
        name: What the model is called.
        others: Names of the models that could be chosen instead.

    Raises:
        TrainingError: The file cannot be read, needs code to be read, or holds the weights of another model.
    """
    if not path.exists():
        raise TrainingError(f"no weights at {path}: give the path of a {', '.join(SUFFIXES)} file")
    if path.suffix.lower() not in SUFFIXES:
        raise TrainingError(f"weights are read from {', '.join(SUFFIXES)} files, got {path}: give one of these")
    state = _without_prefix(_safetensors(path) if path.suffix.lower() == ".safetensors" else _checkpoint(path))
    wrong = _differences(model, state)
    if not wrong:
        # not strict: batch norms of files from before PyTorch 0.4.1 have no num_batches_tracked
        try:
            missing = model.load_state_dict(state, strict=False).missing_keys
        except RuntimeError as error:
            wrong = [str(error).splitlines()[-1].strip()]
        else:
            wrong = _counted(missing, "missing", "are missing")
    if wrong:
        instead = f", or choose its model (--model {' or '.join(others)})" if others else ""
        raise TrainingError(
            f"{path} does not hold the weights of {name}: {'; '.join(wrong)}. Give the weights of a {name}{instead}"
        )
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise TrainingError(f"{path} holds values that are NaN or infinite, in {bad[0]}: give a file of finite weights")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except READ_ERRORS as error:
        raise TrainingError(
            f"{path} cannot be read as a safetensors file: {error}; give a file that save_file of safetensors wrote"
        ) from error


def _checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The state dict of a file of ``torch.save``."""
    advice = f"write the weights alone, torch.save(model.state_dict(), {f'{path.stem}-weights.pth'!r}), and give those"
    try:
        with warnings.catch_warnings():  # about TorchScript archives, which the error names as well
            warnings.simplefilter("ignore")
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files the reader raises whatever their bytes lead to (torch 2.11 to 2.14)
        if needs := re.search(r"GLOBAL (\S+)", str(error)):
            raise TrainingError(
                f"{path} needs code to be read ({needs[1]}), and no code of a file is run: {advice}"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise TrainingError(f"{path} cannot be read as a PyTorch checkpoint ({reason[:80]}): {advice}") from error
    found = data
    if isinstance(data, Mapping):
        found = next((data[key] for key in NESTED if isinstance(data.get(key), Mapping)), data)
        # scripts put the epoch or a note beside the tensors
        found = {k: v for k, v in found.items() if not isinstance(v, int | float | str | None)} or found
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
    ):
        what = (
            f"a dict with the keys {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(data).__name__
        )
        raise TrainingError(f"{path} holds no state dict, but {what[:80]}: {advice}")
    return found


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*PREFIXES, *PREFIXES):  # in either order
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What a state dict has that the model has not, and has in another shape."""
    own = model.state_dict()
    shapes = [
        f"{key} has the shape {list(value.shape)}, not {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    more = f" ({len(shapes)} such)" if len(shapes) > 1 else ""
    return _counted([key for key in state if key not in own], "unknown", "are unknown") + [s + more for s in shapes[:1]]


def _counted(keys: Sequence[str], one: str, several: str) -> list[str]:
    """``3 tensors are missing (conv1.weight, …)``."""
    if not keys:
        return []
    return [f"{keys[0]} is {one}" if len(keys) == 1 else f"{len(keys)} tensors {several} ({keys[0]}, …)"]
