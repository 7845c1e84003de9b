"""The plan of a crawl: which photos, under which keys, in which shards."""
