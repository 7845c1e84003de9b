"""Ranking metrics and their statistics."""
