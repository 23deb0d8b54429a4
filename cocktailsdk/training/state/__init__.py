"""A run's state on disk: written without gaps, checked when read, locked against a second run."""
