"""Views: drawn from keyed hashes, replayed as canonical pixels."""
