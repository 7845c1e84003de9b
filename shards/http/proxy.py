"""The proxies that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name, as curl reads them."""

from __future__ import annotations

import ipaddress
import re
import socket
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote
from urllib.request import getproxies_environment

from yarl import URL

from lavic.errors import ConfigError
from lavic.shards.http.ssrf_guard import parse_address
from lavic.shards.http.url import BadUrl, parse_url


@dataclass(frozen=True)
class Proxy:
    """One proxy."""

    url: URL
    """Without credentials."""
    authorization: str = ""
    """Value of Proxy-Authorization; empty if the proxy needs none. It is never shown."""

    def __repr__(self) -> str:
        return f"Proxy({self.url.raw_host}:{self.url.port})"


@dataclass(frozen=True)
class Proxies:
    """Which requests go through which proxy."""

    schemes: Mapping[str, Proxy]
    """Proxies by the scheme of the link; `all` for other schemes."""
    direct: tuple[str, ...] = ()
    """Entries of NO_PROXY in lower case."""

    @classmethod
    def from_environment(cls) -> Proxies:
        """Read the variables, in upper or lower case; the latter takes precedence.

        Raises:
            ConfigError: None is set, or one cannot be used. The message does not repeat the value.
        """
        values = getproxies_environment()
        direct = tuple(re.split(r"[,\s]+", values.pop("no", "").lower().strip()))
        schemes = {name: _proxy(name, values[name]) for name in ("http", "https", "all") if values.get(name)}
        if not schemes:
            raise ConfigError(
                f"--fetch.proxy env: none of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY is set on {socket.gethostname()}: "
                "set one there (on a Ray cluster before `ray start` on every node), or leave --fetch.proxy out"
            )
        return cls(schemes, tuple(entry for entry in direct if entry))

    def for_url(self, url: URL) -> Proxy | None:
        """The proxy of a request; None if it is sent directly."""
        proxy = self.schemes.get(url.scheme) or self.schemes.get("all")
        if proxy is None or any(_matches(entry, url.raw_host or "", url.port) for entry in self.direct):
            return None
        return proxy


def _proxy(name: str, value: str) -> Proxy:
    variable = f"{name.upper()}_PROXY"
    text = value.strip() if "://" in value else f"http://{value.strip()}"
    if not re.match(r"https?://", text, re.IGNORECASE):
        scheme = text.partition("://")[0][:20]
        raise ConfigError(f"{variable}: {scheme} proxies cannot be used; name an http or https proxy")
    try:
        url = parse_url(text)
    except BadUrl:
        raise ConfigError(f"{variable} is not the address of a proxy, such as http://proxy.example.org:3128") from None
    authorization = ""
    if url.raw_user is not None:
        credentials = f"{unquote(url.raw_user)}:{unquote(url.raw_password or '')}"
        authorization = f"Basic {b64encode(credentials.encode()).decode('ascii')}"
    return Proxy(URL.build(scheme=url.scheme, host=url.raw_host or "", port=url.port), authorization)


def _matches(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of NO_PROXY covers a host: `*`, a domain with all below it, an address, a network in CIDR form.

    A domain or an address may have a port.
    """
    if entry == "*":
        return True
    address = parse_address(host)
    if address is not None and "/" in entry:
        try:
            return address in ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
        except ValueError:
            return False
    match = re.fullmatch(r"(\[.+\]|[^:]+|[^\[]*:[^\[]*:.*?)(?::(\d+))?", entry)
    if match is None or (match[2] and int(match[2]) != port):
        return False
    name = match[1].strip("[]").removeprefix("*").lstrip(".").removesuffix(".")
    if address is not None:
        return parse_address(name) == address
    return bool(name) and (host == name or host.endswith(f".{name}"))
