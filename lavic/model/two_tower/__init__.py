"""The two-tower retriever: embeds conversations and items in the same space, so that photos can be searched."""
