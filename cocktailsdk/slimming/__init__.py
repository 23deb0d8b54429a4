"""Plain models that are physically smaller."""

from .one_line import slim
from .subnets import coupling_difference, slim_subnet

__all__ = ["coupling_difference", "slim", "slim_subnet"]
