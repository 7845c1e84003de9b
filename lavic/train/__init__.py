"""ZeRO-2 engine, checkpoints, the two tasks and the one training loop."""
