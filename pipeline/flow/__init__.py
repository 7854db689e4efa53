"""Flow of clips: conventions, methods, what an expert sees of it."""
