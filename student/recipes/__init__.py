"""What a training run does, as frozen models that refuse unknown keys; free of torch, so faults show at once."""
