"""The loss of a step: distillation and labels, balanced over classes, of clips as they are or mixed in pairs."""
