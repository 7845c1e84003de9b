"""Stage 1: photos in, the loss of their descriptions out."""
