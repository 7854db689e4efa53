"""Tests of mmkd.data_manifests."""
