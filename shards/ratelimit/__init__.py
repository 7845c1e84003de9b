"""Rate limits of hosts, for all workers of a crawl together."""
