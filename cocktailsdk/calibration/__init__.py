"""Passes of data through a model, for scores and reconstruction."""

from .calibrating import calibrate
from .data import CalibrationData

__all__ = ["CalibrationData", "calibrate"]
