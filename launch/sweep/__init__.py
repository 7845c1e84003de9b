"""Stage 2 and evaluation for each category, candidate list and seed, as SLURM arrays."""
