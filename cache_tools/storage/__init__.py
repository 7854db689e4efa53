"""Where a cache lies: a folder or an object store."""
