"""What only rival methods need, plugged into the step engine by its public hooks."""
