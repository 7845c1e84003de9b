"""Indexes of sets and item stores, shared by the processes of a node."""
