"""Indexes of sets of shards and of item stores, shared by the processes of a node."""
