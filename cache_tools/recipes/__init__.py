"""YAML recipes: layers of values, each with its origin, checked before anything starts."""
