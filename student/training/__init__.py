"""The training loop, which knows no modality."""
