"""Exact frames of video files, and the facts that the probe finds."""
