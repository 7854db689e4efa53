"""Networks, training, losses, targets, metrics and evaluation; the command `mmkd-student`."""
