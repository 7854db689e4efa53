"""Metrics, the files of a run, and the table."""
