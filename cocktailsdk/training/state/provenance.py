"""What a run leaves in a net's provenance: nothing that a run which was stopped and went on would have otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...net.subnet_model import SubnetModel
from ..data.loader_state import attribute, loader_length

__all__ = ["note_training"]


def note_training(net: SubnetModel, training: Mapping[str, Any], loader: Iterable[Any]) -> None:
    """Write down how a net was trained, and drop the versions of what was there before.

    Args:
        net: The net; what the user put into its provenance stays.
        training: What the run was asked to do, as JSON values; its seed among them.
        loader: The training data, of which class and length are noted unless ``"data"`` is there already.
    """
    net.provenance.pop("versions", None)
    net.provenance["training"] = dict(training)
    if "data" not in net.provenance:
        data = attribute(loader, "dataset")
        data = loader if data is None else data
        length = loader_length(data)
        size = {} if length is None else {"length": length}
        net.provenance["data"] = {"class": type(data).__qualname__, **size}
