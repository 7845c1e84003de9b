"""Starting the ranks of a command: on this machine, or by torchrun in a SLURM job."""
