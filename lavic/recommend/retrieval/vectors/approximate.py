"""Approximate search by FAISS."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Approximate(Protocol):
    """Finds rows that are likely among the best of a query."""

    def near(self, queries: np.ndarray, k: int) -> list[np.ndarray]:
        """Rows among which most of the k best are: int64 [some] for each query, [queries, width]."""
