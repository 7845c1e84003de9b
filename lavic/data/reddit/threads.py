"""Conversations from the posts of a bucket: for each comment that recommends, the path from the submission to it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from lavic.data.links import NAMED, Link, find_links, short_links
from lavic.data.reddit.bots import is_bot
from lavic.data.reddit.clean_text import context_text, target_text, without_quotes
from lavic.data.reddit.dumps.id_table import key_of
from lavic.data.reddit.dumps.post import NO_PARENT, Post, is_gone
from lavic.data.reddit.item_table import ItemTable
from lavic.data.reddit.sentiment import sentiment
from lavic.data.reddit.settings import LabelSettings

SHORT = "short"
"""Form of a link that was resolved."""


class Dropped(Exception):
    """A comment that does not become a conversation; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A conversation with its metadata."""

    submission: int
    turns: tuple[int, ...]
    """The comments of the context, in their order."""
    comment: int
    """The comment that recommends."""
    created: int
    """When the submission was posted, in seconds since 1970."""
    subreddit: str
    author: str
    """A hash of the recommender's name."""
    asker: str
    """A hash of the asker's name."""
    forms: tuple[str, ...]
    """How the comment's links name their items."""
    hosts: tuple[str, ...]
    """The domains of the shops."""
    context: str
    """`<submission>` and `<comment>`s."""
    context_items: tuple[str, ...]
    gt: str
    gt_items: tuple[str, ...]

    @property
    def row(self) -> dict[str, object]:
        """The row in the LaViC format."""
        return {key: getattr(self, key) for key in ("context", "context_items", "gt", "gt_items")}


@dataclass(frozen=True, kw_only=True)
class _Target:
    item: str
    link: Link
    line: str
    quoted: bool


@dataclass
class Threads:
    """The threads of a bucket."""

    posts: Iterable[Post]
    items: ItemTable
    labels: LabelSettings
    bots: Collection[str] = ()
    """More accounts of bots, in lower case."""
    resolved: Mapping[str, str] = field(default_factory=dict)
    """The item of each short link that was resolved."""
    counts: Counter[str] = field(default_factory=Counter)
    """Comments by reason, posts and notes, see `funnel`."""
    _linked: tuple[dict[int, list[_Target]], dict[int, list[_Target]]] = field(default_factory=lambda: ({}, {}))
    """The items that submissions and comments link to."""

    def examples(self) -> Iterator[Example]:
        """The conversations, by the key of their submission, then by time."""
        linking = [post for post in self.comments.values() if self._targets(post)]
        linking.sort(key=lambda post: (key_of(post.submission), post.created, post.id))
        for comment in linking:
            self.counts["linking"] += 1
            try:
                example = self._example(comment)
            except Dropped as reason:
                self.counts[str(reason)] += 1
            else:
                self.counts["kept"] += 1
                yield example

    @cached_property
    def _by_kind(self) -> tuple[dict[int, Post], dict[int, Post]]:
        kinds: tuple[dict[int, Post], dict[int, Post]] = ({}, {})
        repeated: dict[tuple[bool, int], list[Post]] = {}
        for post in self.posts:
            first = kinds[post.is_comment].setdefault(post.id, post)
            if first is not post:
                self.counts["repeated"] += 1
                repeated.setdefault((post.is_comment, post.id), [first]).append(post)
        for (is_comment, id), versions in repeated.items():
            kinds[is_comment][id] = _latest(versions)
        self.counts["comments"], self.counts["submissions"] = len(kinds[True]), len(kinds[False])
        return kinds

    @property
    def submissions(self) -> dict[int, Post]:
        """The submissions of the bucket by id."""
        return self._by_kind[0]

    @property
    def comments(self) -> dict[int, Post]:
        """The comments of the bucket by id."""
        return self._by_kind[1]

    def _targets(self, post: Post) -> list[_Target]:
        """The items of the catalogue that a post links to, in order, once each."""
        if post.id not in self._linked[post.is_comment]:
            text = "\n".join(part for part in (post.title, post.text, post.link) if part)
            self._linked[post.is_comment][post.id] = self._read_targets(text) if NAMED.search(text) else []
        return self._linked[post.is_comment][post.id]

    def _read_targets(self, text: str) -> list[_Target]:
        targets: dict[str, _Target] = {}
        unquoted = set(without_quotes(text).split("\n"))
        for line in text.split("\n"):
            links = find_links(line)
            for url in short_links(line) if self.resolved else ():
                if asin := self.resolved.get(url):
                    links.append(Link(asin=asin, form=SHORT, host=url.split("/")[2]))
            for link, item in zip(links, self.items.parents([link.asin for link in links]), strict=True):
                quoted = line not in unquoted
                if item and (item not in targets or (targets[item].quoted and not quoted)):
                    targets[item] = _Target(item=item, link=link, line=line, quoted=quoted)
        return list(targets.values())

    def _example(self, comment: Post) -> Example:
        labels = self.labels
        submission = self.submissions.get(comment.submission)
        targets = self._recommended(comment, submission)
        if submission is None:
            raise Dropped("submission_missing")
        if submission.gone or is_gone(submission.title):
            raise Dropped("submission_gone")
        path = self._path(comment)
        named = list(dict.fromkeys(t.item for post in (submission, *path) for t in self._targets(post)))
        new_targets = [target for target in targets if target.item not in named]
        if not new_targets:
            raise Dropped("in_context")
        if len(new_targets) > labels.max_items:
            raise Dropped("too_many_items")
        recommended = [target for target in new_targets if not self._is_against(target)]
        if not recommended:
            raise Dropped("sentiment")
        example = self._conversation(submission, path, comment, named, recommended)
        self.counts["items_in_context"] += len(targets) - len(new_targets)
        self.counts["items_against"] += len(new_targets) - len(recommended)
        self.counts["items_quoted"] += len(self._targets(comment)) - len(targets)
        self.counts["variants"] += sum(target.link.asin != target.item for target in recommended)
        self.counts["short_links"] += sum(target.link.form == SHORT for target in recommended)
        self.counts["score_unknown"] += comment.score is None
        return example

    def _recommended(self, comment: Post, submission: Post | None) -> list[_Target]:
        """The items that someone other than the asker recommends in a usable comment."""
        labels = self.labels
        if comment.gone:
            raise Dropped(comment.gone)
        if not comment.author:
            raise Dropped("author_missing")
        if is_gone(comment.author) and labels.deleted_authors == "drop":
            raise Dropped("author_deleted")
        if comment.official or is_bot(comment, self.bots):
            raise Dropped("bot")
        targets = [target for target in self._targets(comment) if not target.quoted]
        if not targets:
            raise Dropped("quoted_links")
        if submission is not None and comment.author == submission.author and not is_gone(comment.author):
            raise Dropped("asker")
        if labels.min_score is not None and comment.score is not None and comment.score < labels.min_score:
            raise Dropped("score")
        return targets

    def _is_against(self, target: _Target) -> bool:
        least = self.labels.min_sentiment
        return least is not None and sentiment(context_text(target.line)) < least

    def _path(self, comment: Post) -> list[Post]:
        """The comments between the submission and a comment, from the first."""
        path: list[Post] = []
        visited = {comment.id}
        parent = comment.parent
        while parent:
            post = self.comments.get(parent)
            if parent == NO_PARENT or post is None or parent in visited or post.submission != comment.submission:
                self._lacks("parent_missing")
                break
            visited.add(parent)
            parent = post.parent
            if post.gone:
                self._lacks("parent_gone")
            elif is_bot(post, self.bots):
                self._lacks("bot_context")
            else:
                path.append(post)
        return path[::-1]

    def _lacks(self, reason: str) -> None:
        if self.labels.incomplete == "drop":
            raise Dropped(reason)
        self.counts["turns_left_out"] += 1

    def _conversation(
        self, submission: Post, path: Sequence[Post], comment: Post, named: Sequence[str], targets: Sequence[_Target]
    ) -> Example:
        conversation = render_conversation(submission, path, comment)
        if conversation is None:
            raise Dropped("no_context")
        context, gt = conversation
        return Example(
            submission=submission.id,
            turns=tuple(post.id for post in path),
            comment=comment.id,
            created=submission.created,
            subreddit=submission.subreddit or comment.subreddit,
            author=author_hash(comment.author),
            asker=author_hash(submission.author),
            forms=tuple(target.link.form for target in targets),
            hosts=tuple(target.link.host for target in targets),
            context=context,
            context_items=tuple(named),
            gt=gt,
            gt_items=tuple(target.item for target in targets),
        )


def render_conversation(submission: Post, path: Sequence[Post], comment: Post) -> tuple[str, str] | None:
    """The context in the LaViC format and the comment's text; None where nothing is left of the context."""
    users = {post.author for post in (submission, *path, comment)} - {""}
    title, body = context_text(submission.title, users), context_text(submission.text, users)
    turns = [("submission", f"{title} {body}".strip())]
    turns += [("comment", context_text(post.text, users)) for post in path]
    context = "".join(f"<{tag}>{text}</{tag}>\n" for tag, text in turns if text)
    return (context, target_text(comment.text, users)) if context else None


@lru_cache(maxsize=1 << 14)
def author_hash(name: str) -> str:
    """16 hex digits for an account; empty for a deleted one."""
    if not name or is_gone(name):
        return ""
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _latest(versions: Sequence[Post]) -> Post:
    """The version that was retrieved last; it is marked as gone if any version is."""
    latest = max(versions, key=lambda post: (post.retrieved, repr(post)))
    gone = latest.gone or min((post.gone for post in versions if post.gone), default="")
    return replace(latest, gone=gone)
