"""Shards as jobs on Ray or in local processes, ranks as Ray actors, and their progress."""
