"""The trainer, its tasks, checkpoints and the ZeRO-2 engine."""
