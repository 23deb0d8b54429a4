"""Weights saved where they would be lost: something failed after training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..net.subnet_model import SubnetModel

__all__ = ["rescued_bundle", "written_to_temporary"]

log = logging.getLogger(__name__)


def rescued_bundle(net: SubnetModel, hint: str = "") -> str | None:
    """Save a net's weights and masks to a new temporary folder.

    Args:
        net: The networks.
        hint: What else may be typed.

    Returns:
        Where they are and what to type; ``None`` where they cannot be written.
    """
    folder = written_to_temporary(lambda folder: net.save_pretrained(folder / "bundle"))
    if folder is None:
        return None
    return (
        f"The trained weights and masks are in the net, and saved in {folder / 'bundle'}: {hint}"
        f"cocktailsdk.from_pretrained({str(folder / 'bundle')!r}, model)"
    )


def written_to_temporary(write: Callable[[Path], Any]) -> Path | None:
    """Call a function with a new temporary folder; ``None`` where it raises, which is logged."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="cocktail-rescued-"))
        write(folder)
    except Exception as error:  # one failure is being told of already
        log.warning("what was trained could not be saved to a temporary folder: %s", error)
        return None
    return folder
