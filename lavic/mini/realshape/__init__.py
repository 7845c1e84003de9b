"""A model folder that is LLaVA-v1.6-Mistral-7B in all but depth and weights, for tests and for planning."""
