"""Ranks and their collectives, stop signals, the hang watchdog, and the Ray session."""
