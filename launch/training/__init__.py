"""What `lavic distill` and `lavic tune` have in common."""
