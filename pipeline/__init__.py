"""Flow, boxes, experts, teacher and the cache build; the command `mmkd-cache`."""
