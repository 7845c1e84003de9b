"""How often each host may be asked, by all workers together."""
