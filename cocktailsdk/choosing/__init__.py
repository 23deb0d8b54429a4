"""Choosing a subnetwork: measured on this machine, and picked by budget."""

from .bench import RUNTIMES, bench
from .deployed_size import deployed_bytes
from .layer_use import LayerUse, layers_used, use_counts
from .pick import pick
from .profile import DeviceProfile, SubnetCost, Timing, pareto_front, read_profile

__all__ = [
    "RUNTIMES",
    "DeviceProfile",
    "LayerUse",
    "SubnetCost",
    "Timing",
    "bench",
    "deployed_bytes",
    "layers_used",
    "pareto_front",
    "pick",
    "read_profile",
    "use_counts",
]
