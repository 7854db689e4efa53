"""Cached logits as training targets: mixed, verified, shared by a host's processes."""
