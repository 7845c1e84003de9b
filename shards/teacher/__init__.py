"""What `lavic describe` is made of: the teachers, the check of their texts, and what is kept of a shard in work."""
