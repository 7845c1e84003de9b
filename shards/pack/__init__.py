"""One shard, from its plan to its seal, and the set's last step."""
