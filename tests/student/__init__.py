"""Tests of mmkd.student."""
