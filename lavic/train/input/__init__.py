"""Builds micro-batches from samples: the samples of a step, their distribution over the ranks, and collation."""
