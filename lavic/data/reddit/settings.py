"""Settings of which comments become labels, what their context is, and how they are split."""

from __future__ import annotations

from datetime import date, datetime, timezone
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lavic.config import settings


@settings
class LabelSettings:
    """Which comments with a link are recommendations."""

    min_score: int | None = Field(default=1, ge=-1_000_000, le=1_000_000)
    """Lowest score of a comment: upvotes minus downvotes. Arctic Shift's are those of 36 hours after the post,
    Pushshift's those of its retrieval. A comment whose score is not known is kept, and counted. None keeps all."""
    min_sentiment: int | None = Field(default=0, ge=-1000, le=1000)
    """Lowest sentiment of the lines that link to an item: positive words minus negative ones, and minus two for a
    warning such as "do not buy". None keeps all."""
    incomplete: Literal["drop", "keep"] = "drop"
    """Conversations with a turn that was deleted or is not in the dumps. keep: without that turn."""
    deleted_authors: Literal["drop", "keep"] = "drop"
    """Comments by deleted accounts, which may be the original poster's."""
    max_items: int = Field(default=20, ge=1, le=10_000)
    """Maximum number of items of a comment; with more it is a list, not an answer."""


@settings
class SplitSettings:
    """How conversations become train, valid and test: by the time of their submission, threads undivided."""

    valid_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the conversations for validation, those before the newest."""
    test_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the conversations for the test, the newest."""
    valid_from: str = ""
    """Instead of the shares: first day of validation in UTC, as 2022-01-01; needs --split.test-from."""
    test_from: str = ""
    """First day of the test."""
    near_duplicates: float = Field(default=0.8, ge=0.5, le=1)
    """Submissions whose sets of three-word sequences agree in at least this share (Jaccard, estimated by MinHash) go
    into one split; so do crossposts."""

    @field_validator("valid_from", "test_from")
    @classmethod
    def _a_day(cls, text: str) -> str:
        if text:
            date.fromisoformat(text)
        return text

    @model_validator(mode="after")
    def _ordered(self) -> SplitSettings:
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share leave nothing to train on")
        if bool(self.valid_from) != bool(self.test_from) or self.valid_from > self.test_from:
            raise ValueError("valid_from and test_from are given together, the earlier day first")
        return self

    @property
    def days(self) -> tuple[int, int] | None:
        """Where validation and test begin, in seconds since 1970; None where shares decide."""
        if not self.valid_from:
            return None
        valid_start, test_start = (
            int(datetime.fromisoformat(day).replace(tzinfo=timezone.utc).timestamp())
            for day in (self.valid_from, self.test_from)
        )
        return valid_start, test_start
