"""The inputs of an evaluation, checked together before a model is loaded."""
