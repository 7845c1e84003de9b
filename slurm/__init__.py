"""Runnable batch scripts; installed as `lavic.slurm`."""
