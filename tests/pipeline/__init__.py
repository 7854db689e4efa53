"""Tests of mmkd.pipeline."""
