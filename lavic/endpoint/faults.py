"""What goes wrong with a request, by kind, and which kinds are worth another try."""

from __future__ import annotations

import json
import random
import time
from email.utils import parsedate_to_datetime

from lavic.config.secrets import redact
from lavic.errors import LavicError

RETRIED = frozenset({"throttled", "server", "connect", "timeout", "cut", "html", "json", "shape"})
"""429; 408 and 5xx; no connection; none within the time limit; an answer that ends early; with status 200: a web page,
something else that is no JSON, JSON of another form."""
PAUSING = frozenset({"throttled", "connect"})
"""Retried faults after which all requests to the server wait."""
FATAL = frozenset({"auth", "missing", "quota", "redirect", "tls"})
"""401 and 403; 404 and 405; no credit left; a redirect, which is not followed; a certificate that is not trusted: every
further request would fail the same."""
REFUSED = "refused"
"""400, 413, 422 and others: this request alone is wrong."""

_LONGEST_BACKOFF_S = 60.0
_SHOWN = 300


class EndpointError(LavicError, RuntimeError):
    """Servers that do not answer, after all retries."""


class Fault(Exception):
    """A request that got no usable answer.

    Attributes:
        kind: One of `RETRIED`, `FATAL` or `REFUSED`.
        message: One line, without secrets.
        wait_s: Seconds that the server asks to wait; None if it does not say.
    """

    def __init__(self, kind: str, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.wait_s = kind, message, wait_s


def fault_of_status(status: int, body: bytes, retry_after: str | None) -> Fault:
    """The fault that a status other than 200 stands for."""
    reason, code = _reason(body)
    message = f"answers {status}{f' ({reason})' if reason else ''}"
    if status == 429 and code in ("insufficient_quota", "billing_hard_limit_reached"):
        return Fault("quota", message)
    if status == 429:
        return Fault("throttled", message, _seconds(retry_after))
    if status in (408, 425) or status >= 500:
        return Fault("server", message, _seconds(retry_after))
    if status in (401, 403, 407):
        return Fault("auth", message)
    if status in (404, 405):
        return Fault("missing", message)
    return Fault("redirect" if 300 <= status < 400 else REFUSED, message)


def backoff_s(first_s: float, attempt: int) -> float:
    """Seconds before retry `attempt` (from 0): doubled each time, with jitter so that clients do not come together."""
    return min(first_s * 2.0 ** min(attempt, 20), _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)


def shown(text: str) -> str:
    """The beginning of a server's words, on one line, without secrets."""
    text = " ".join(redact(text).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _reason(body: bytes) -> tuple[str, str]:
    """The message and the code in the body of an error."""
    text = body.decode("utf-8", "replace").strip()
    if text.startswith("<"):
        return "a web page", ""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return shown(text), ""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if not isinstance(error, dict):
        return shown(error if isinstance(error, str) else text), ""
    reason = error.get("message") or error.get("detail") or error.get("error") or text
    return shown(reason if isinstance(reason, str) else json.dumps(reason)), str(
        error.get("code") or error.get("type") or ""
    )


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header, which has a number or a date."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
