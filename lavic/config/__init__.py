"""Settings classes, filled from their defaults, yaml files and the command line."""
