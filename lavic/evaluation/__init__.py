"""Baselines, controls, test sets and the assessment of rankings."""
