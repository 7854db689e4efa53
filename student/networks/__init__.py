"""RGB networks, their pretrained weights, and jitter."""
