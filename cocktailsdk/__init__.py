"""One checkpoint, every sparse pattern, every ratio.

The public names are listed in ``__all__``; each is imported when it is first used, so that
``import cocktailsdk`` loads neither torch nor any model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved as _moved
from .errors import (
    AdapterError,
    BundleError,
    CocktailError,
    ExportFailed,
    PatternError,
    SlimError,
    SubnetError,
    TrainingError,
)
from .version import __version__

if TYPE_CHECKING:
    from .api import CocktailNet as CocktailNet
    from .api import from_pretrained as from_pretrained
    from .api import sparsify as sparsify
    from .inspection import Inspection as Inspection
    from .inspection import inspect as inspect
    from .masks import Mask as Mask
    from .net.costs import SubnetReport as SubnetReport
    from .patterns import MLP as MLP
    from .patterns import NM as NM
    from .patterns import UMG as UMG
    from .patterns import Block as Block
    from .patterns import Channel as Channel
    from .patterns import Depth as Depth
    from .patterns import Experts as Experts
    from .patterns import Heads as Heads
    from .patterns import Layers as Layers
    from .patterns import Pattern as Pattern
    from .patterns import Product as Product
    from .patterns import Subnet as Subnet
    from .patterns import Transposable as Transposable
    from .patterns import Unstructured as Unstructured
    from .patterns import Vector as Vector
    from .patterns import register_pattern as register_pattern
    from .patterns.scores import Score as Score
    from .patterns.scores import register_score as register_score
    from .slimming import reconstruct as reconstruct
    from .slimming import slim as slim
    from .training import BatchSettings as BatchSettings
    from .training import CoLoop as CoLoop
    from .training import CoTrainer as CoTrainer
    from .training import DistillationSettings as DistillationSettings
    from .training import EvaluationSettings as EvaluationSettings
    from .training import ExecutionSettings as ExecutionSettings
    from .training import OutputSettings as OutputSettings
    from .training import RoundSettings as RoundSettings
    from .training import finetune as finetune
    from .verify import Failure as Failure
    from .verify import NMCheck as NMCheck
    from .verify import verify_nm as verify_nm

_moved.install()

_WHERE = {
    "BatchSettings": ".training",
    "Block": ".patterns",
    "Channel": ".patterns",
    "CoLoop": ".training",
    "CoTrainer": ".training",
    "CocktailNet": ".api",
    "Depth": ".patterns",
    "Experts": ".patterns",
    "DistillationSettings": ".training",
    "EvaluationSettings": ".training",
    "ExecutionSettings": ".training",
    "Failure": ".verify",
    "Heads": ".patterns",
    "Layers": ".patterns",
    "Inspection": ".inspection",
    "Mask": ".masks",
    "MLP": ".patterns",
    "NM": ".patterns",
    "NMCheck": ".verify",
    "OutputSettings": ".training",
    "Pattern": ".patterns",
    "Product": ".patterns",
    "RoundSettings": ".training",
    "Subnet": ".patterns",
    "SubnetReport": ".net.costs",
    "Transposable": ".patterns",
    "UMG": ".patterns",
    "Unstructured": ".patterns",
    "Vector": ".patterns",
    "finetune": ".training",
    "from_pretrained": ".api",
    "inspect": ".inspection",
    "reconstruct": ".slimming",
    "register_pattern": ".patterns",
    "register_score": ".patterns.scores",
    "Score": ".patterns.scores",
    "slim": ".slimming",
    "sparsify": ".api",
    "verify_nm": ".verify",
}

__all__ = [
    "MLP",
    "NM",
    "UMG",
    "AdapterError",
    "BatchSettings",
    "Block",
    "BundleError",
    "Channel",
    "CoLoop",
    "CoTrainer",
    "CocktailError",
    "CocktailNet",
    "Depth",
    "DistillationSettings",
    "EvaluationSettings",
    "ExecutionSettings",
    "Experts",
    "ExportFailed",
    "Failure",
    "Heads",
    "Inspection",
    "Layers",
    "Mask",
    "NMCheck",
    "OutputSettings",
    "Pattern",
    "PatternError",
    "Product",
    "RoundSettings",
    "Score",
    "SlimError",
    "Subnet",
    "SubnetError",
    "SubnetReport",
    "TrainingError",
    "Transposable",
    "Unstructured",
    "Vector",
    "__version__",
    "finetune",
    "from_pretrained",
    "inspect",
    "reconstruct",
    "register_pattern",
    "register_score",
    "slim",
    "sparsify",
    "verify_nm",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name], __name__), name)
        globals()[name] = value  # the next look-up finds it without this function
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
