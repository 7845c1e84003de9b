"""Ranking, metrics, statistics, baselines and the report."""
