"""Several tasks on one cache: signs of life, claims, journal, finishing, status."""
