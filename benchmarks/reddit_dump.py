"""Dumps of comments and submissions as Arctic Shift publishes them: fields, lengths, escapes, words.

A comment has 61 fields in about 1,500 bytes; its text has 157 characters in the mean, as those of December 2025, half
of them less than 100. The words follow Zipf's law, among them some that look like Amazon's names to a search (amazing,
razor, .com). One comment in `LINKING` links to an item of the catalogue, and one in `NAMING` names Amazon without a
link: more than on all of Reddit, about as in a community about products.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lavic.data.reddit.dumps.post import id_of

LINKING, NAMING = 300, 100
THREAD = 8
"""Comments of a thread."""
ITEMS = 1000
"""Items of the catalogue."""

_COMMON = r"""
the i to a and of it is that you in for this but on was not with my be have are if so just they like your me what or as
at can do it's all get out don\u2019t one would more when up there no about people from how some good know time even
really because them think than will had been he an only by too make I\u2019m we want who much their has other then way
could need now which use also still that\u2019s never see any most better go work where first over new should something
right got back being her after did same lot into well these going every those very can\u2019t doesn\u2019t thing years
things said buy before why actually off sure probably skin hair razor blade soap amazing it\u2019ll size crazy dry oil
brand product \"natural\" price lazy r\u00e9sum\u00e9 https://i.redd.it/3zam9x.jpg \ud83d\ude02 &gt; **not**
[here](https://www.reddit.com/r/wicked_edge/wiki) prize amazed youtube.com/watch?v=aZ3mzQ
"""
"""The most frequent words, as they stand in JSON."""
_SYLLABLES = "ba con de er fi gra ho in jo ka lum mi nor o pre qua ri sta ter u ven wi ex yo"
"""Of all other words."""
_LINE = (
    '{"all_awardings":[],"approved_at_utc":null,"approved_by":null,"archived":false,"associated_award":null,'
    '"author":"%(author)s","author_flair_background_color":"","author_flair_css_class":null,'
    '"author_flair_richtext":[],"author_flair_template_id":null,"author_flair_text":%(flair)s,'
    '"author_flair_text_color":"dark","author_flair_type":"text","author_fullname":"t2_%(account)s",'
    '"author_is_blocked":false,"author_premium":false,'
    '"banned_at_utc":null,"banned_by":null,"body":"%(body)s","can_gild":false,'
    '"collapsed":false,"collapsed_reason":null,"collapsed_reason_code":null,'
    '"controversiality":0,"created_utc":%(time)d,"distinguished":null,"edited":false,"gilded":0,'
    '"gildings":{},"id":"%(id)s","is_submitter":false,"link_id":"t3_%(link)s","locked":false,'
    '"mod_note":null,"mod_reports":[],"name":"t1_%(id)s","no_follow":true,"num_reports":null,'
    '"parent_id":"%(parent)s","permalink":"/r/%(subreddit)s/comments/%(link)s/%(slug)s/%(id)s/",'
    '"removal_reason":null,"retrieved_on":%(retrieved)d,"score":%(score)d,'
    '"score_hidden":false,"send_replies":true,"stickied":false,"subreddit":"%(subreddit)s","subreddit_id":"t5_%(community)s",'
    '"subreddit_name_prefixed":"r/%(subreddit)s","subreddit_type":"public","total_awards_received":0,'
    '"unrepliable_reason":null,"user_reports":[],'
    '"_meta":{"retrieved_2nd_on":%(retrieved)d,"is_edited":false}}\n'
)
_BATCH = 10_000


def comment_lines(count: int, seed: int = 0, first: int = 0) -> Iterator[bytes]:
    """Lines of a dump of comments, numbered from `first` on."""
    draw = np.random.default_rng(seed)
    words, shares = _vocabulary()
    flairs = ["null"] * 4 + ['"Merkur 34C \\u2013 Astra"', '""']
    for start in range(first, first + count, _BATCH):
        numbers = range(start, min(start + _BATCH, first + count))
        # Half of the comments are short; the mean is some 30 words.
        lengths = np.minimum(draw.lognormal(2.85, 1.0, len(numbers)), 1500).astype(int) + 1
        drawn = np.searchsorted(shares, draw.random(lengths.sum())).tolist()
        accounts = draw.integers(1 << 24, 1 << 36, len(numbers)).tolist()
        end = 0
        for n, length, account in zip(numbers, lengths.tolist(), accounts, strict=True):
            body = " ".join([words[word] for word in drawn[end : end + length]])
            end += length
            if n % LINKING == 0:
                body += f" https://www.amazon.com/dp/B0{account % ITEMS:08d}"
            elif n % NAMING == 0:
                body += " I bought it on Amazon."
            thread = n // THREAD
            link, community = _submission_id(thread), 700 + thread * thread % 1999
            is_answer = n % THREAD and account % 2
            values = {
                "author": f"{words[200 + account % 3000]}_{account % 977}",
                "flair": flairs[account % len(flairs)],
                "account": id_of(account),
                "body": body.replace(" . ", ".\\n\\n"),
                "time": 1_700_000_000 + n,
                "id": _comment_id(n),
                "parent": f"t1_{_comment_id(n - 1)}" if is_answer else f"t3_{link}",
                "link": link,
                "slug": "_".join([words[300 + thread * k % 3001] for k in (3, 5, 7, 11)]),
                "subreddit": words[community],
                "community": id_of(2_000_000 + community * 97),
                "retrieved": 1_700_200_000 + n,
                "score": account % 40 + 1,
            }
            yield (_LINE % values).encode()


def submission_lines(comments: int) -> Iterator[bytes]:
    """Lines of a dump of the submissions of so many comments."""
    draw = np.random.default_rng(1)
    words, _ = _vocabulary()
    for n in range(comments // THREAD + 1):
        title, text = (" ".join(words[k] for k in draw.integers(200, 3000, size).tolist()) for size in (8, 30))
        row = {
            "id": _submission_id(n),
            "title": title,
            "selftext": text,
            "author": f"asker{n}",
            "created_utc": 1_700_000_000 + n * THREAD,
            "score": 3,
            "subreddit": "wicked_edge",
        }
        yield json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _comment_id(n: int) -> str:
    return id_of(60_000_000_000 + 997 * n)


def _submission_id(n: int) -> str:
    return id_of(1_000_000_000 + 389 * n)


def write_dump(path: Path, lines: Iterator[bytes]) -> None:
    """Writes a dump unless it is there: one frame of zstd with a long window, as they are published."""
    import zstandard

    if path.exists():
        return
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as packed:
        for line in lines:
            packed.write(line)
    part.rename(path)


def _vocabulary() -> tuple[list[str], np.ndarray]:
    """Words as JSON holds them, the frequent ones first, and their shares summed up."""
    draw = np.random.default_rng(0)
    words, syllables = _COMMON.split(), _SYLLABLES.split()
    words.insert(10, ".")
    while len(words) < 8000:
        words.append("".join(syllables[k] for k in draw.integers(0, len(syllables), draw.integers(2, 5)).tolist()))
    shares = np.cumsum(1 / (np.arange(len(words)) + 3))
    return words, shares / shares[-1]
