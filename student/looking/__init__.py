"""Looking at runs: what they did, how sure a difference between them is, and where a step's time goes."""
