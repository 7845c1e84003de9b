"""Dynamic batching: requests that wait together are answered by one call of the recommender."""
