"""What a finished student says of videos that no manifest lists."""
