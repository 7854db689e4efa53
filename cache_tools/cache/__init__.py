"""The cache on disk: layout, records, fingerprints, arrays, and the reader."""
