"""The embedded default: a drawn catalogue, its photo server and a miniature LLaVA-NeXT."""
