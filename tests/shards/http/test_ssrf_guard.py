"""Private and metadata addresses, as IPv4, IPv6 and mapped forms."""

from __future__ import annotations

import ipaddress

import pytest

from lavic.shards.http.ssrf_guard import is_metadata, is_public

PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::1"]
PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1"),
    *("255.255.255.255", "198.18.0.1", "192.0.2.1", "240.0.0.1", "::", "::1", "fc00::1", "fd12::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::1", "2002:c0a8:101::1"),
    *("::127.0.0.1", "64:ff9b:1::a00:1", "2001:db8::1", "fec0::1", "2001::1"),
]
METADATA = [
    *("169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"),
    *("fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"),
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text)) and not is_metadata(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", [*PRIVATE, *METADATA])
def test_private_and_metadata_addresses_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", PRIVATE)
def test_private_addresses_are_not_metadata(text: str) -> None:
    assert not is_metadata(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", METADATA)
def test_metadata_addresses_are_recognized(text: str) -> None:
    assert is_metadata(ipaddress.ip_address(text))
