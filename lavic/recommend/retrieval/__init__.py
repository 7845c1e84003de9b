"""Candidates from a whole catalogue: an index of its items, searched by words, by meaning or by item tokens."""

from lavic.recommend.retrieval.fusion import fuse
from lavic.recommend.retrieval.hits import Hits
from lavic.recommend.retrieval.index import RetrievalIndex
from lavic.recommend.retrieval.query import query_text

__all__ = ["Hits", "RetrievalIndex", "fuse", "query_text"]
