"""The mask of a subnetwork and its forms: packed bits, nesting levels, units that go, copies on the device."""

from .mask import Mask

__all__ = ["Mask"]
