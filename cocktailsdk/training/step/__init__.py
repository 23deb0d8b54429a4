"""The step engine: one optimizer step of one or several subnetworks, from a batch to the update."""
