"""Boxes of hands and objects, found with a detector of one's own."""
