"""Requests and answers of the HTTP API, as its OpenAPI page describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lavic.data.schema import as_text
from lavic.recommend.recommendation import Recommendation

EXAMPLE: dict[str, Any] = {"conversation": "a warm hat for winter, not too bright", "k": 3}


class Message(BaseModel):
    """A chat message. Keys besides these are ignored."""

    role: str
    """user, assistant or system; messages of system are left out."""
    content: str | list[dict[str, Any]] | None = None
    """Text, or parts of type `text`."""


class _Request(BaseModel):
    """A body. A key that is null counts as left out, as many clients write it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts as 0 and 1
        raise PydanticCustomError("int_type", "input should be a valid integer")
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1)]


class RecommendRequest(_Request):
    """What to recommend for."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    conversation: str | list[Message | str]
    """Text, a list of turns (the first is the seeker's), or chat messages."""
    candidates: list[str] | None = None
    """Item ids to rank; without them the whole catalogue is searched."""
    k: Count = 10
    """Maximum number of items of the answer."""
    exclude: list[str] = []
    """Item ids not to recommend, such as those that were disliked."""


class FeedbackRequest(_Request):
    """What somebody thinks of an item that was shown."""

    model_config = ConfigDict(extra="forbid")

    conversation: str | list[Message | str]
    """As it was when the item was shown."""
    candidates: list[str]
    """Item ids that were shown, best first."""
    item: str
    """The one that was liked or not."""
    liked: bool


class StreamOptions(_Request):
    """How an answer is streamed. Keys besides these are ignored."""

    include_usage: bool = False
    """Add a last chunk without choices that has `usage`, as OpenAI's API does."""


class ChatRequest(_Request):
    """A request of the OpenAI chat API. Sampling settings and other keys are ignored: there is nothing to sample."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "a warm hat"}]}]}
    )

    messages: list[Message] = Field(min_length=1)
    model: Annotated[str, AfterValidator(as_text)] = "lavic"
    """Any name; the answer repeats it."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    candidates: list[str] | None = None
    """Item ids to rank, as in /v1/recommend."""
    k: Count = 10
    """Maximum number of items of the answer."""
    exclude: list[str] = []
    """Item ids not to recommend."""


class Item(BaseModel):
    """An item of the catalogue."""

    id: str
    title: str
    photo: str | None
    """Path of its photo on this server; null where it has none."""


class ScoredItem(Item):
    """A recommended item."""

    probability: float
    """That the model names it, among all candidates."""
    scores: dict[str, float]
    """Retrieval method -> its score, of the methods that found the item."""


class RecommendResponse(BaseModel):
    """The recommended items, best first."""

    items: list[ScoredItem]
    candidates: int
    """How many items were ranked."""
    none: float | None = None
    """Probability of "none of these", of bundles that were tuned with this answer."""


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


def recommend_response(answer: Recommendation, photos: list[str | None]) -> RecommendResponse:
    """An answer of the recommender in the API's form, with the path of each item's photo."""
    items = [
        ScoredItem(id=item.id, title=item.title, photo=photo, probability=item.probability, scores=dict(item.scores))
        for item, photo in zip(answer, photos, strict=True)
    ]
    return RecommendResponse(items=items, candidates=answer.candidates, none=answer.none)
