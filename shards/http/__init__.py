"""HTTP requests to hosts that nobody vouches for: links, addresses, connections, robots.txt."""
