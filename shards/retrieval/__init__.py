"""The parts of `lavic retrieve`."""
