"""Cross-validation folds: the candidates of a training conversation come from a head that was not trained on it.

A retriever finds the targets of its training conversations more often than those of new ones. Without folds, the
candidate lists for training stage 2 would be easier than those at inference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lavic.data.schema import Conversation

FINAL = -1
"""The fold of a conversation outside the training set: the head that was trained on all conversations."""


def submission_hash(conversation: Conversation) -> int:
    """A 64-bit hash of the seeker's request without case and white space: rows of a submission share a fold."""
    text = " ".join(conversation.turns[0].text.lower().split()) if conversation.turns else ""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def submission_hashes(conversations: Sequence[Conversation]) -> np.ndarray:
    """The distinct hashes of all requests, sorted: uint64 [submissions]."""
    return np.unique(np.array([submission_hash(conversation) for conversation in conversations], np.uint64))


def fold_of(conversation: Conversation, trained: np.ndarray, folds: int) -> int:
    """The fold of a conversation's request.

    Args:
        trained: `submission_hashes` of the training conversations.
        folds: Number of folds; 0 for none.

    Returns:
        0 to folds - 1 for a training request: its head was not trained on the request. Otherwise `FINAL`.
    """
    hashed = submission_hash(conversation)
    position = int(np.searchsorted(trained, np.uint64(hashed)))
    in_training = position < len(trained) and int(trained[position]) == hashed
    return hashed % folds if in_training and folds else FINAL
