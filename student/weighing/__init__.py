"""Weights of experts fitted to cached logits."""
