"""Rankings of candidate lists, and the model that makes them."""
