"""Sound: the track of a video decoded, and log-mel spectrograms around the sampled frames."""
