"""Checkpoint files as people share them: read without running anything, their tensors found and named."""
