"""A conversation as the text of a query, and its shortening to what a model reads.

Embedding models cut what is too long at its end, without a word, and with it the turn that was asked last. Here the
last turn is kept, then the seeker's request, then the other turns from the newest on.
"""

from __future__ import annotations

from collections.abc import Callable

from lavic.data.schema import Conversation

TURN_END = "\x1e\n"
"""Between two turns of a query: a record separator, which no tokenizer takes for a word, and a line's end."""


def query_text(conversation: Conversation) -> str:
    """The turns of a conversation, oldest first, as one text; `shorten` cuts it between turns."""
    turns = [turn.text.replace(TURN_END[0], " ") for turn in conversation.turns]
    return TURN_END.join(turn for turn in turns if turn)


def plain(query: str) -> str:
    """A query as a reader sees it."""
    return query.replace(TURN_END, "\n")


def shorten(query: str, limit: int, cut: Callable[[str, int, bool], tuple[str, int]]) -> str:
    """A query in at most about `limit` tokens: the last turn first, then the request, then the rest from the newest on.

    A turn that is too long for what is left loses its middle if it is the last one, else its end.

    Args:
        query: By `query_text`, or any text, which counts as one turn.
        limit: Tokens.
        cut: (text, limit, middle) -> the text in at most so many tokens, cut in its middle or at its end, and its
            number of tokens.
    """
    turns = query.split(TURN_END)
    order = [len(turns) - 1, *([0] if len(turns) > 1 else []), *range(len(turns) - 2, 0, -1)]
    kept_turns: dict[int, str] = {}
    for position in order:
        if limit <= 0:
            break
        kept_turns[position], tokens = cut(turns[position], limit, position == order[0])
        limit -= tokens
    return "\n".join(kept_turns[position] for position in sorted(kept_turns) if kept_turns[position])
