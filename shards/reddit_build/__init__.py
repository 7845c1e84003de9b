"""The steps of `lavic reddit`, each on one file or one part of the buckets."""
