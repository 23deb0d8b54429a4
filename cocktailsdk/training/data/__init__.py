"""The training loader as a stream of batches that resumes where the run stopped."""
