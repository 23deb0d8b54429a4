"""A run of several processes: how they were launched, what they share, what each of them computes."""
