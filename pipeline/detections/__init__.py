"""Detected boxes: one table for whole data sets, and readers of the forms that others publish."""
