"""Search by words: BM25 over the items' texts, by bm25s."""
