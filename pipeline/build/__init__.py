"""The build of a cache, from plan to shard."""
