"""Recognizes posts by bots."""

from __future__ import annotations

import re
from collections.abc import Collection

from lavic.data.reddit.dumps.post import Post

_NAMES = """automoderator autotldr autowikibot amputatorbot anti-gif-bot b0trank checks_out_bot colorizethis
commonmisspellingbot converter-bot convertstometric flair_helper gifreversingbot gifv-bot goodbot_badbot haikusbot
helperbot_ imgurtranscriber imguralbumbot jiffybot linkfixerbot mentioned_videos metric_units movieguide pricezombie
profanitycounter remindmebot repostsleuthbot sneakpeekbot smallsubbot stabbot streamablemirrors substitute-bot
thehelpfulbot timezone_bot totesmessenger tweetposter useles-converter-bot video_descriptionbot videodescriptionbot
wikitextbot youtubefactsbot ytubeinfobot"""
NAMES = frozenset(_NAMES.split())
"""Known accounts of bots, in lower case; `--bots` adds more."""

# "bot" as a separate part of the name; "abbot" and "talbot" are ordinary names.
_NAME = re.compile(r".*(?:[-_]bot|[a-z0-9]Bot|BOT)(?:[-_]?\d*)|bot[-_].*|(?:auto|the)[-_]?mod(?:erator)?[-_]?\w*")
_SELF = re.compile(
    r"\b(?:i'?m|i am|this is)\s+(?:just\s+)?(?:a|an)\s+(?:automated\s+|friendly\s+|reddit\s+)?(?:ro)?bot\b"
    r"|\b(?:beep,?\s*boop|boop,?\s*beep)\b|action was performed automatically"
    r"|\bthis (?:comment|message) was (?:left|posted|generated|written) (?:automatically|by a bot)\b"
    r"|\bcontact the moderators of this subreddit\b",
    re.IGNORECASE,
)


def is_bot(post: Post, names: Collection[str] = ()) -> bool:
    """Whether a comment is by a bot: by the list, by its author's name, or by what it says about itself.

    `names` are more accounts, in lower case.
    """
    name = post.author.lower()
    if name in NAMES or name in names or _NAME.fullmatch(post.author):
        return True
    return bool(_SELF.search(post.text.replace("^", "").replace("’", "'")))
