"""Helpers that know nothing of sparsity: undoing what running a model changes."""
