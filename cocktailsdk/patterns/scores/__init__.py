"""Scores: how much each weight, unit or layer matters. One file a score; new ones register themselves by name."""

from .activation import Activation
from .base import Comparison, Layers, Need, Observed, Routed, Score
from .cosine import Cosine
from .fisher import Fisher
from .greedy import Greedy
from .magnitude import Magnitude
from .registry import register_score, registered_scores, score_named
from .sparsegpt import SparseGPT
from .taylor import Taylor
from .wanda import Wanda

__all__ = [
    "Activation",
    "Comparison",
    "Cosine",
    "Fisher",
    "Greedy",
    "Layers",
    "Magnitude",
    "Need",
    "Observed",
    "Routed",
    "Score",
    "SparseGPT",
    "Taylor",
    "Wanda",
    "register_score",
    "registered_scores",
    "score_named",
]
