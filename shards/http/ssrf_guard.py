"""Refuses addresses of private networks and of clouds' metadata services: links in a catalogue are untrusted."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_NAMES = 10_000
"""Names whose checks are cached."""
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48")))
"""Other networks whose last 32 bits are an IPv4 address: compatible, translated, local NAT64."""
_METADATA = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure
            "100.100.100.200/32",  # Alibaba
            "192.0.0.192/32",  # Oracle
            "fd00:c1::/32",  # Oracle
            "fd00:ec2::/32",  # Amazon
            "fd20:ce::/32",  # Google
        ),
    )
)
"""Metadata services of clouds outside the link-local addresses."""


class BlockedAddress(Exception):
    """An address that must not be requested."""


class CheckedResolver(AbstractResolver):
    """Resolves names and refuses those with any address that must not be requested.

    Connections go to the addresses that it returns, so a name that resolves to others later is checked again.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._inner = ThreadedResolver()
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a host. Raises BlockedAddress."""
        results = await self._inner.resolve(host, port, family)
        for result in results:
            _check(ipaddress.ip_address(result["host"].partition("%")[0]), host, self._allow_private)
        return results

    async def close(self) -> None:
        await self._inner.close()


class NameChecker:
    """Checks the addresses of names that a proxy resolves; results are cached for `cache_s` seconds."""

    def __init__(self, *, allow_private: bool, cache_s: float) -> None:
        self._resolver = CheckedResolver(allow_private=allow_private)
        self._cache_s = cache_s
        self._checks: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    async def check(self, host: str) -> None:
        """Check a host's name.

        Raises:
            BlockedAddress: One of its addresses must not be requested.
            OSError: It cannot be resolved.
        """
        until, task = self._checks.get(host, (0.0, None))
        if task is None or time.monotonic() >= until:
            if len(self._checks) >= _MAX_NAMES:
                self._checks.clear()
            task = asyncio.create_task(self._resolver.resolve(host, family=socket.AF_UNSPEC))
            self._checks[host] = (time.monotonic() + self._cache_s, task)
        try:
            await asyncio.shield(task)
        except OSError:
            # A retry resolves it again.
            self._checks.pop(host, None)
            raise

    def close(self) -> None:
        """Cancel running resolutions."""
        for _, task in self._checks.values():
            task.cancel()


def check_url(url: URL, *, allow_private: bool) -> None:
    """Refuse a URL from `parse_url` whose host is a literal forbidden address; a resolver never sees these.

    Raises:
        BlockedAddress: It must not be requested.
    """
    if address := parse_address(host := url.raw_host or ""):
        _check(address, host, allow_private)


def parse_address(host: str) -> Address | None:
    """The address of a host that is a literal IP address; None for a host name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet: not loopback, private, link-local, multicast or metadata.

    For an IPv6 address that wraps an IPv4 one (mapped, NAT64, 6to4) the latter counts. Other IPv6 addresses are public
    only if they are global unicast.
    """
    address = _unwrap(address)
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not address.is_multicast and not _is_metadata(address)


def is_metadata(address: Address) -> bool:
    """Whether an address may be a cloud's metadata service: link-local addresses, and some others."""
    addresses = (address, _unwrap(address), *_embedded_addresses(address))
    return any(form.is_link_local or _is_metadata(form) for form in addresses)


def _is_metadata(address: Address) -> bool:
    return any(address.version == network.version and address in network for network in _METADATA)


def _check(address: Address, host: str, allow_private: bool) -> None:
    if is_metadata(address):
        raise BlockedAddress(
            f"{host} is {address}, an address of clouds' metadata services; such addresses are never requested"
        )
    if not allow_private and not is_public(address):
        raise BlockedAddress(
            f"{host} is {address}, inside a private network; --fetch.allow-private allows your own servers"
        )


def _unwrap(address: Address) -> Address:
    """The IPv4 address that an IPv6 address wraps, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _embedded_addresses(address: Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses inside an IPv6 address of less usual kinds."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    teredo = address.teredo
    last = (
        [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)] if any(address in network for network in _EMBEDDING) else []
    )
    return [*last, *(teredo or ())]
