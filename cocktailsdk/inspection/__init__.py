"""What of a model is prunable, what is coupled, and what is kept whole and why."""

from .found import ChannelGroup, Eligibility, Inspection, Layer, Saving, Slice
from .inspecting import inspect
from .why import Answer, Why

__all__ = ["Answer", "ChannelGroup", "Eligibility", "Inspection", "Layer", "Saving", "Slice", "Why", "inspect"]
