"""What `lavic evaluate` reads before it ranks, and what it prints."""
