"""A model and its subnetworks: switched in place, by several threads, counted. Knows nothing of training or files."""

from ..moved import moved_names

__getattr__ = moved_names(__name__, {"CocktailNet": "cocktailsdk.CocktailNet", "sparsify": "cocktailsdk.sparsify"})
