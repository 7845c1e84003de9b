"""The pipeline as a graph of steps: settings, status, digests, dry run."""
