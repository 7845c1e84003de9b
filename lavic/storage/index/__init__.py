"""Indexes that the processes of a node share: files of arrays that each of them maps."""
