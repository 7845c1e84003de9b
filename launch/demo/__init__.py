"""`lavic demo`: its stages, how they run, and the summary of their results."""
