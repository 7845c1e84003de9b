"""Whether a comment advises against what it links to: by a list of words, for the lines with the link.

It finds warnings ("do not buy this", "fell apart in a week") but not irony.
"""

from __future__ import annotations

import re

_NEGATIVE = """avoid awful bad broke broken burned burnt cheaply counterfeit crap crappy defective disappointed
disappointing disgusting disliked fail failed fails fake faulty flimsy garbage hate hated horrible ineffective
irritated irritating junk knockoff lousy mediocre misleading nasty overpriced painful peeled pointless poor poorly
regret regretted returned ripoff rubbish ruined scam stinks sucked sucks terrible trash unsafe unusable useless waste
wasted worse worst worthless"""
_POSITIVE = """adore affordable amazing awesome beautiful best better brilliant comfortable decent effective excellent
fantastic favorite favourite fine gentle good great helped helpful helps highly holy impressed incredible like liked
likes love loved lovely loves nice perfect perfectly quality recommend recommended recommends reliable satisfied solid
sturdy superb swear sweet terrific wonderful worked works worth"""
_NEGATIONS = """no not never none nothing hardly barely without isn't wasn't aren't don't doesn't didn't won't wouldn't
can't cannot couldn't shouldn't haven't hasn't isnt wasnt dont doesnt didnt wont wouldnt cant couldnt shouldnt"""
_WEIGHTS = {**dict.fromkeys(_NEGATIVE.split(), -1), **dict.fromkeys(_POSITIVE.split(), 1)}
_NEGATE = frozenset(_NEGATIONS.split())
_REACH = 3
"""Number of words that a negation affects, within its clause."""
_WARNING = re.compile(
    r"\b(?:do\s*n[o']?t|dont|never|wouldn'?t|would not|shouldn'?t)\s+(?:ever\s+)?"
    r"(?:buy|get|order|use|recommend|bother|waste|purchase|touch|trust)\b"
    r"|\bstay(?:ed)? (?:far )?away from\b|\bwaste of (?:money|time)\b|\bfell apart\b|\bsteer clear\b"
    r"|\bsent (?:it|them) back\b",
    re.IGNORECASE,
)
_PRAISE = re.compile(
    r"\b(?:can'?t|can ?not|couldn'?t|could not)\s+(?:be (?:happier|better)|go wrong|live without"
    r"|(?:recommend|praise|say)\b(?: [a-z]+){0,4} (?:enough|more))\b"
)
"""Negations that praise."""
_WARNING_WEIGHT, _PRAISE_WEIGHT = -2, 2
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[.,;:!?\n]")


def sentiment(text: str) -> int:
    """The number of positive words minus that of negative ones; negated words count with the opposite sign.

    Each warning subtracts two, and each praise by negation adds two. Links must have been removed from the text.
    """
    lowered = text.lower().replace("’", "'").replace("not only", " ")
    lowered, praises = _PRAISE.subn(" ", lowered)
    total = _WARNING_WEIGHT * len(_WARNING.findall(lowered)) + _PRAISE_WEIGHT * praises
    since = _REACH
    for word in _WORD.findall(_WARNING.sub(" ", lowered)):
        if not word[0].isalpha():
            since = _REACH
            continue
        if word in _NEGATE:
            since = 0
            continue
        weight = _WEIGHTS.get(word, 0)
        total += -weight if since < _REACH else weight
        since += 1
    return total
