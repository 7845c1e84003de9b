"""HTTP requests to untrusted hosts: URLs, addresses, connections, robots.txt."""
