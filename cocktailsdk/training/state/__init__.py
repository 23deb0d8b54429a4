"""A run's state on disk: written without gaps, checked when read, locked against a second run."""

from ...moved import moved_names

__getattr__ = moved_names(__name__, {"write_atomic": "cocktailsdk.io.atomic.write_atomic"})
