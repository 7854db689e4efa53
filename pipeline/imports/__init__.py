"""Experts from other people's checkpoints."""
