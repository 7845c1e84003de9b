"""The two-tower retriever: conversations and items as vectors of one space, so that photos can be searched."""
