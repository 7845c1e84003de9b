"""What watches a training run: one file for each callback."""
