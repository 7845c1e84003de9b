"""What the demo runs on: a synthetic catalogue, its photo server and a miniature LLaVA-NeXT."""
