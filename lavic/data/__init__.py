"""Records, catalogues, conversations and shards: everything read from or written to files."""
