"""The student's clips: stored views replayed as batches."""
