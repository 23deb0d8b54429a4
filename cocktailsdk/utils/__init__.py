"""Helpers that know nothing of sparsity: nested containers, and undoing what running a model changes."""
