"""What of a model is prunable, what is coupled, and what is kept whole and why."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .found import ChannelGroup as ChannelGroup
    from .found import Eligibility as Eligibility
    from .found import Inspection as Inspection
    from .found import Layer as Layer
    from .found import Saving as Saving
    from .found import Slice as Slice
    from .inspecting import inspect as inspect
    from .why import Answer as Answer
    from .why import Why as Why

__all__ = ["Answer", "ChannelGroup", "Eligibility", "Inspection", "Layer", "Saving", "Slice", "Why", "inspect"]

_WHERE = {"Answer": ".why", "Why": ".why", "inspect": ".inspecting"}


def __getattr__(name: str) -> Any:
    # Late, so that names of layers can be folded without loading torch.
    if name in __all__:
        return getattr(importlib.import_module(_WHERE.get(name, ".found"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
