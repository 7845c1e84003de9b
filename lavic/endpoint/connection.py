"""One request to one server: JSON in, JSON out, or a fault."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from yarl import URL

from lavic import __version__
from lavic.endpoint.faults import Fault, fault_of_status, shown
from lavic.endpoint.settings import EndpointSettings

_MOST_BYTES = 256 << 20
_MOST_ERROR_BYTES = 64 << 10
_CONNECT_S = 30.0
_READY_S = 10.0


class Connection:
    """The connections of one client. Of one event loop."""

    def __init__(self, settings: EndpointSettings) -> None:
        headers = {"User-Agent": f"lavic/{__version__}", "Content-Type": "application/json"}
        if key := settings.key:
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=settings.concurrency),
            timeout=aiohttp.ClientTimeout(total=settings.timeout_s, sock_connect=min(_CONNECT_S, settings.timeout_s)),
            trust_env=settings.proxy == "env",
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._timeout_s = settings.timeout_s

    async def close(self) -> None:
        """Closes them."""
        await self._session.close()

    async def is_up(self, base: str) -> bool:
        """Whether a server answers at all; one that says it is not ready does not."""
        timeout = aiohttp.ClientTimeout(total=_READY_S)
        try:
            async with self._session.get(_address(base, "models"), allow_redirects=False, timeout=timeout) as response:
                return int(response.status) < 500
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return False

    async def post(self, base: str, path: str, body: bytes) -> Any:
        """The JSON of the answer. Raises Fault where there is none."""
        try:
            # A redirect is not followed: the key would go along.
            async with self._session.post(_address(base, path), data=body, allow_redirects=False) as response:
                if not 200 <= response.status < 300:
                    error = await _read(response, _MOST_ERROR_BYTES, strict=False)
                    raise fault_of_status(response.status, error, response.headers.get("Retry-After"))
                return _parse(await _read(response, _MOST_BYTES), response.headers.get("Content-Type", ""))
        except aiohttp.ConnectionTimeoutError:
            raise Fault("connect", "cannot be connected to (no reply)") from None
        except asyncio.TimeoutError:
            raise Fault("timeout", f"no complete answer within {self._timeout_s:g} s") from None
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            raise Fault("tls", f"its certificate is not accepted ({shown(str(error))})") from None
        except (aiohttp.ClientConnectorError, aiohttp.ClientProxyConnectionError) as error:
            raise Fault("connect", f"cannot be connected to ({shown(error.strerror or str(error))})") from None
        except aiohttp.ClientHttpProxyError as error:
            raise Fault("auth" if error.status == 407 else "connect", f"the proxy answers {error.status}") from None
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            raise Fault("cut", f"the connection breaks ({shown(str(error)) or type(error).__name__})") from None


def _address(base: str, path: str) -> URL:
    url = URL(base)
    return url.with_path(f"{url.path.rstrip('/')}/{path}").with_query(url.query)


async def _read(response: aiohttp.ClientResponse, max_bytes: int, *, strict: bool = True) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > max_bytes:
            if strict:
                raise Fault("shape", f"answers more than {max_bytes >> 20} MiB")
            break
    return bytes(data)


def _parse(body: bytes, content_type: str) -> Any:
    if "html" in content_type.lower() or body[:64].lstrip().startswith(b"<"):
        raise Fault("html", "answers with a web page, not JSON: is it the address of an API?")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Fault("json", f"answers something that is not JSON ({len(body)} bytes)") from None
    if isinstance(answer, dict) and isinstance(error := answer.get("error"), dict):  # an error with status 200
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        raise fault_of_status(status, body, None)
    return answer
