"""The photo server: real requests over loopback."""

from __future__ import annotations

import http.client
from pathlib import Path

import pytest

from lavic.errors import DataError, LaunchError
from lavic.mini.photo_server import PhotoServer


def test_serves_a_folder_over_one_connection(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a b.jpg").write_bytes(b"\xff\xd8photo")
    (tmp_path / "secret.txt").write_text("outside")
    with PhotoServer(tmp_path / "photos") as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        socket = None
        for path, status, body in [
            ("/a%20b.jpg", 200, b"\xff\xd8photo"),
            ("/none.jpg", 404, b""),
            ("/../secret.txt", 404, b""),
            ("/%2e%2e/secret.txt", 404, b""),
            ("/%00", 404, b""),
            ("/", 404, b""),
            ("/a%20b.jpg?size=1", 200, b"\xff\xd8photo"),
        ]:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (status, body), path
            assert socket in (None, connection.sock), "the connection was not kept"
            socket = connection.sock
        connection.request("HEAD", "/a%20b.jpg")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "image/jpeg" and answer.headers["Content-Length"] == "7"
        assert answer.read() == b""


def test_host_0_0_0_0_listens_on_all_addresses(tmp_path: Path) -> None:
    with PhotoServer(tmp_path, host="0.0.0.0") as server:
        port = int(server.url.rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.2", port, timeout=10)
        connection.request("GET", "/none.jpg")
        assert connection.getresponse().status == 404


def test_a_missing_folder_and_a_used_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        PhotoServer(tmp_path / "none")
    with PhotoServer(tmp_path) as server, pytest.raises(LaunchError, match="choose another port"):
        PhotoServer(tmp_path, port=int(server.url.rpartition(":")[2]))
