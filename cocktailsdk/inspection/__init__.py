"""What of a model is prunable, what is coupled, and what is kept whole and why."""

from .findings import ChannelGroup, Eligibility, Layer, Saving, Slice
from .inspecting import inspect
from .inspection import Inspection
from .why import Answer, Why

__all__ = ["Answer", "ChannelGroup", "Eligibility", "Inspection", "Layer", "Saving", "Slice", "Why", "inspect"]
