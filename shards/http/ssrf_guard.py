"""Which addresses a crawler may ask: public ones. Links in a catalogue are somebody else's words."""

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

_NAMES = 10_000
"""Names whose checks are remembered."""
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_WRAPPING = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48")))
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
"""Where clouds tell a machine its secrets; the others do at link-local addresses."""


class BlockedAddress(Exception):
    """An address that a crawler has no business at."""


class CheckedResolver(AbstractResolver):
    """Looks names up and refuses a name with any address that is not to be asked.

    What it returns is what is connected to: a name that answers otherwise the next time is checked then.

    Args:
        allow_private: Let addresses of this machine and of private networks pass.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._inner = ThreadedResolver()
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a host. Raises BlockedAddress."""
        found = await self._inner.resolve(host, port, family)
        for result in found:
            _check(ipaddress.ip_address(result["host"].partition("%")[0]), host, self._allow_private)
        return found

    async def close(self) -> None:
        """Nothing to close."""
        await self._inner.close()


class CheckedNames:
    """Looks names up and checks their addresses for requests that a proxy sends, which looks them up itself.

    Args:
        allow_private: Let addresses of this machine and of private networks pass.
        kept: Seconds that a result holds.
    """

    def __init__(self, *, allow_private: bool, kept: float) -> None:
        self._resolver = CheckedResolver(allow_private=allow_private)
        self._kept = kept
        self._checks: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    async def check(self, host: str) -> None:
        """Check a host's name.

        Raises:
            BlockedAddress: One of its addresses is not to be asked.
            OSError: It cannot be looked up.
        """
        until, task = self._checks.get(host, (0.0, None))
        if task is None or time.monotonic() >= until:
            if len(self._checks) >= _NAMES:
                self._checks.clear()
            task = asyncio.create_task(self._resolver.resolve(host, family=socket.AF_UNSPEC))
            self._checks[host] = (time.monotonic() + self._kept, task)
        try:
            await asyncio.shield(task)
        except OSError:
            # Another try looks it up again.
            self._checks.pop(host, None)
            raise

    def close(self) -> None:
        """Give up look-ups that are under way."""
        for _, task in self._checks.values():
            task.cancel()


def check_url(url: URL, *, allow_private: bool) -> None:
    """Refuse an address written as a number, which no look-up of a name will see.

    Args:
        url: As `lavic.shards.http.url.read_link` returns it, numbers in their usual form.
        allow_private: Let addresses of this machine and of private networks pass.

    Raises:
        BlockedAddress: It is not to be asked.
    """
    host = url.raw_host or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    _check(address, host, allow_private)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet: not loopback, private, link-local, multicast or metadata.

    An IPv4 address inside an IPv6 one (mapped, NAT64, 6to4) is judged by itself. Of IPv6 only global unicast is public.
    """
    address = _bare(address)
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not address.is_multicast and not _is_metadata(address)


def is_secret(address: Address) -> bool:
    """Whether an address is a cloud's metadata service, or of the link itself, where most of them are."""
    return any(one.is_link_local or _is_metadata(one) for one in (address, _bare(address), *_wrapped(address)))


def _is_metadata(address: Address) -> bool:
    return any(address.version == network.version and address in network for network in _METADATA)


def _check(address: Address, host: str, allow_private: bool) -> None:
    if is_secret(address):
        raise BlockedAddress(f"{host} is {address}, where clouds keep their metadata; never asked")
    if not allow_private and not is_public(address):
        raise BlockedAddress(
            f"{host} is {address}, inside a private network; --fetch.allow-private lets your own servers through"
        )


def _bare(address: Address) -> Address:
    """The IPv4 address that an IPv6 address wraps, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _wrapped(address: Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses inside an IPv6 address of the less usual kinds."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    teredo = address.teredo
    last = (
        [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)] if any(address in network for network in _WRAPPING) else []
    )
    return [*last, *(teredo or ())]
