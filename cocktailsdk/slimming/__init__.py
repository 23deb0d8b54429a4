"""Plain models that are physically smaller."""

from .one_line import slim
from .reconstruction import reconstruct
from .subnets import coupling_difference, slim_subnet
from .views import Views, channel_views

__all__ = ["Views", "channel_views", "coupling_difference", "reconstruct", "slim", "slim_subnet"]
