"""Copies of remote shards on the local disk, and files that are kept open."""
