"""What a cluster is asked for: the recipe's section, scripts for sbatch, and handing them to Slurm."""
