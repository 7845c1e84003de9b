"""SLURM: submitting and querying jobs."""
