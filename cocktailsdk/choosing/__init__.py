"""Choosing a subnetwork: measured on this machine, and picked by budget."""

from .bench import RUNTIMES, bench
from .layer_use import LayerUse, layers_used, use_counts
from .pick import pick
from .profile import DeviceProfile, SubnetCost, Timing, pareto_front, read_profile
from .sizes import deployed_bytes

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
