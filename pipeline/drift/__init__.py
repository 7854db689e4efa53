"""The teacher run again on a sample of a cache."""
