"""Published annotation files as manifests: one file for each data set."""
