"""Tests of mmkd.cache_tools."""
