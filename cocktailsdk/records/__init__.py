"""How a bundle's model may be built: a list of classes and arguments, checked before a model library is touched.

A build record is JSON from a file that anybody may have written. ``timm.toml``, ``torchvision.toml`` and
``transformers.toml`` list the classes that a record may name, and the arguments that it may give, with their kinds.
Whatever is not listed is refused. While a model is built, a fence stops this thread from using the network, unpickling,
starting processes and asking at the terminal.
"""

from .check import check_record
from .fence import fenced
from .kinds import Bounds
from .tables import LIBRARIES, PASS, check_version, library

__all__ = ["LIBRARIES", "PASS", "Bounds", "check_record", "check_version", "fenced", "library"]
