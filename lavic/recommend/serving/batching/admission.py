"""Which requests are taken: those that can be expected to be answered in time."""

from __future__ import annotations

import asyncio
import math

from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving.errors import ApiError

_FIRST_GUESS_S = 0.05
"""Seconds of a prompt, before the first batch was measured."""
_SENDING_OF_DEADLINE, _SENDING_S = 0.05, 0.4
"""The end of the deadline, for sending the refusal of what is not answered yet: this share of it, and so many seconds
(at most a quarter), by which a flood of requests can delay a short one."""
_MOST_OF_WAIT = 0.85
"""Share of that wait in which a request must be expected to be answered when it is taken into the queue."""
_BATCH_OF_DEADLINE = 0.25
"""Share of the deadline that a batch may be expected to take."""
_REFUSAL_S = 0.1
"""Seconds before a request that is not taken is answered, at most a tenth of the deadline: clients that ask again at
once would otherwise take the processor from the model, and an overloaded server would not recover."""
_SLOWER, _FASTER = 0.5, 0.2
"""Share of the last batch in the running mean of a prompt's seconds, by whether it was slower or faster than the mean:
a mean that is too low costs answers that come too late, one that is too high only a few refusals."""


class Admission:
    """Estimates when requests are answered, by the recent time of a prompt. Used in one event loop.

    Attributes:
        prompt_s: Running mean of a prompt's seconds.
        measured: Whether a batch was measured yet.
        running: Prompts of the batch that is computed now.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.prompt_s = _FIRST_GUESS_S
        self.measured = False
        self.running = 0
        self._began = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds for which an answer is waited for."""
        deadline = self.settings.deadline
        return deadline - max(_SENDING_OF_DEADLINE * deadline, min(_SENDING_S, deadline / 4))

    @property
    def refusal_s(self) -> float:
        """Seconds before a request that is not taken is answered."""
        return min(_REFUSAL_S, self.settings.deadline / 10)

    @property
    def longest_s(self) -> float:
        """Seconds that a batch may be expected to take."""
        return _BATCH_OF_DEADLINE * self.settings.deadline

    def begin(self, prompts: int) -> None:
        """The computation of a batch begins."""
        self._began, self.running = asyncio.get_running_loop().time(), prompts

    def end(self) -> float:
        """The batch is done; returns its seconds."""
        seconds = asyncio.get_running_loop().time() - self._began
        self.measure(seconds / self.running)
        self.running = 0
        return seconds

    def measure(self, prompt_s: float) -> None:
        """Takes the seconds of a prompt in the last batch into their running mean."""
        share = _SLOWER if prompt_s > self.prompt_s else _FASTER
        self.prompt_s += (share if self.measured else 1.0) * (prompt_s - self.prompt_s)
        self.measured = True

    def admits(self, prompts: int, requests: int, waiting: int) -> bool:
        """Whether a request that comes now can be expected to be answered in time; else it would only delay the others.

        An idle server always tries, so that a mean that is far too high does not stay so.

        Args:
            prompts: Of the request.
            requests: How many wait.
            waiting: Prompts of those.
        """
        if requests >= self.settings.queue:
            return False
        if not requests and not self.running:
            return True
        return self._ahead_s(waiting) + prompts * self.prompt_s <= _MOST_OF_WAIT * self.wait_s

    def too_many(self, waiting: int) -> ApiError:
        """The answer to a request that is not taken."""
        headers = {"Retry-After": str(self._retry_s(waiting))}
        return ApiError(429, "too many requests wait already; try again later", headers=headers)

    def late(self, waiting: int) -> ApiError:
        """The answer to a request whose deadline has passed, or will have when it could be answered."""
        message = f"not answered within {self.settings.deadline:g} s; try again later"
        return ApiError(503, message, headers={"Retry-After": str(self._retry_s(waiting))})

    def _ahead_s(self, waiting: int) -> float:
        """Seconds that everything which was taken is expected to take yet."""
        seconds = waiting * self.prompt_s
        if self.running:
            # A batch that is overdue is expected to take as long again as it is overdue.
            spent = asyncio.get_running_loop().time() - self._began
            seconds += abs(self.running * self.prompt_s - spent)
        return seconds

    def _retry_s(self, waiting: int) -> int:
        """Seconds until what was taken should be answered."""
        return max(1, math.ceil(min(self._ahead_s(waiting), self.settings.deadline)))
