"""What the demo runs on: a drawn catalogue, its photo server and a miniature LLaVA-NeXT."""
