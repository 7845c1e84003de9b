"""Folds of the training conversations: each is retrieved for by a head that was not trained on it.

A retriever that was trained on a conversation finds its target more often than it will for a new one. Candidate lists
for the next stage's training would then be easier than those of its use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lavic.data.schema import Conversation

FINAL = -1
"""The fold of a conversation that is not like any training conversation: the head trained on all of them."""


def submission_hash(conversation: Conversation) -> int:
    """A 64-bit hash of the seeker's request, whatever its case and blanks: rows of one submission share a fold."""
    text = " ".join(conversation.turns[0].text.lower().split()) if conversation.turns else ""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def submission_hashes(conversations: Sequence[Conversation]) -> np.ndarray:
    """The hashes of all requests, each once, ascending: uint64 [submissions]."""
    return np.unique(np.array([submission_hash(conversation) for conversation in conversations], np.uint64))


def fold_of(conversation: Conversation, trained: np.ndarray, folds: int) -> int:
    """The fold that a conversation's request is in.

    Args:
        conversation: Any conversation.
        trained: `submission_hashes` of the training conversations.
        folds: Number of folds; 0 for none.

    Returns:
        0 to folds - 1 for a request that was trained on: of the head that was not. `FINAL` for any other.
    """
    hashed = submission_hash(conversation)
    place = int(np.searchsorted(trained, np.uint64(hashed)))
    known = place < len(trained) and int(trained[place]) == hashed
    return hashed % folds if known and folds else FINAL
