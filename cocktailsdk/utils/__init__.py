"""Helpers that know nothing of subnetworks."""
