"""Search by vectors: a row of numbers for each item, compared with that of a query."""
