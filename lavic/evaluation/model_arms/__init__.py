"""Arms that rank with a model: the tuned one, its controls, the base model; and what the order of a list does."""
