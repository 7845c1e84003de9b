"""From samples to micro-batches: which samples make a step, on which rank, and how they are collated."""
