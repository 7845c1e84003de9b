"""The two-tower retriever: pairs of conversation and target in, a projection of each tower out."""
