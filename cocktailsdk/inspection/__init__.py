"""What of a model is prunable, what is coupled, and what is kept whole and why."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .findings import ChannelGroup as ChannelGroup
    from .findings import Eligibility as Eligibility
    from .findings import Layer as Layer
    from .findings import Saving as Saving
    from .findings import Slice as Slice
    from .inspecting import inspect as inspect
    from .inspection import Inspection as Inspection
    from .why import Answer as Answer
    from .why import Why as Why

__all__ = ["Answer", "ChannelGroup", "Eligibility", "Inspection", "Layer", "Saving", "Slice", "Why", "inspect"]

_WHERE = {"Answer": ".why", "Why": ".why", "Inspection": ".inspection", "inspect": ".inspecting"}


def __getattr__(name: str) -> Any:
    # Late, so that names of layers can be folded without loading torch.
    if name in __all__:
        return getattr(importlib.import_module(_WHERE.get(name, ".findings"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
