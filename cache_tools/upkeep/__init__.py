"""A finished cache's upkeep: verify, merge, export, inspect."""
