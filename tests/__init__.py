"""Tests of mmkd; see README.md."""
