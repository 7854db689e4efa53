"""How a command runs: worker processes, progress, interruption, exit codes."""
