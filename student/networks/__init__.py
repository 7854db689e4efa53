"""Video networks, their heads, and their pretrained weights."""
