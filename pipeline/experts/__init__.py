"""Experts and the teacher: networks on one modality each."""
