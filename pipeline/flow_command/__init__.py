"""The command `mmkd-cache flow`: flow alone, in the layouts of other programs."""
