"""Secrets are not taken from a command line, and are in nothing that is written."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from lavic.cli import main
from lavic.config import Reference, dump, flatten, load, parse, settings
from lavic.config.secrets import MASK, holds_secret, redact, redact_args, reveal
from lavic.errors import ConfigError
from lavic.tracking.journal import read_events
from lavic.tracking.mlflow_sync import sync
from lavic.tracking.settings import TrackingSettings
from lavic.tracking.tracker import Tracker

SECRET = "pw-1234"

HIDDEN = [
    f"http://me:{SECRET}@mlflow:5000/x",
    f"postgresql+psycopg2://me:{SECRET}@db/mlflow",
    f"http://me:p@{SECRET}@mlflow:5000",
    f"http://me:{SECRET}/x@mlflow:5000",
    f"http://{SECRET}@mlflow:5000",
    f"socks5h://me:{SECRET}@proxy:1080",
    f"http%3A%2F%2Fme%3A{SECRET}%40mlflow",
    f"https://host/a?x=1&token={SECRET}#end",
    f"https://host/a?sig={SECRET}&se=2030",
    f"https://host/a?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
    f"https%3A%2F%2Fhost%2Fa%3Ftoken%3D{SECRET}",
    f"Authorization: Basic {SECRET}",
    f"{{'Authorization': 'Bearer {SECRET}'}}",
    "Bearer eyJhbGciOi.pw-1234567.abc",
    f"--export=ALL,MLFLOW_TRACKING_PASSWORD={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f'aws_secret_access_key = "{SECRET}"',
    f"could not connect: HTTPSConnectionPool(http://me:{SECRET}@h:1): refused",
]
SHOWN = [
    "http://mlflow:5000/#/experiments/1",
    "http://[::1]:5000/a@b",
    "http://mlflow:5000/team@x",
    "sqlite:////home/me@x:y/mlflow.db",
    "s3://bucket/prefix?versionId=3",
    "ssh://git@host/x.git",
    "postgresql://me@db/mlflow",
    "/data/a%20b/what?/x#y",
    "a lamp, basic black/white, made 2020",
    "tokens_per_batch=8192",
    "me@example.org",
    "--lora.r 8",
    "LAVIC_VENV=/venv",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_are_seen_and_left_out(text: str) -> None:
    assert holds_secret(text)
    assert "pw-1234" not in redact(text) and MASK in redact(text)


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert not holds_secret(text)
    assert redact(text) == text


def test_values_of_the_environment_are_left_out_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a/b c-1234")
    basic = base64.b64encode(b"me:a/b c-1234").decode()
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxy%2F1234@proxy:1080")
    text = f"a/b c-1234 | a%2Fb%20c-1234 | a%2Fb+c-1234 | {basic} | proxy%2F1234 | proxy/1234"
    assert redact(text) == " | ".join([MASK] * 6)


def test_a_plain_word_of_the_environment_stays_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "mlflow")
    assert redact("http://mlflow:5000") == "http://mlflow:5000"


def test_a_file_that_others_can_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "address"
    file.write_text(f"http://me:{SECRET}@h")
    file.chmod(0o600)
    reveal(f"@{file}", "--uri")
    assert not caplog.text
    file.chmod(0o644)
    reveal(f"@{file}", "--uri")
    assert f"chmod 600 {file}" in caplog.text and SECRET not in caplog.text


def test_a_word_behind_a_flag_that_is_called_a_secret() -> None:
    assert redact_args(["--api-key", "abc", "--out", "abc"]) == ["--api-key", MASK, "--out", "abc"]


@settings
class Deep:
    """Settings that may hold anything."""

    uri: Annotated[str | None, Reference] = None
    """An address."""
    env: dict[str, Any] = Field(default_factory=dict)
    """Variables."""
    options: tuple[str, ...] = ()
    """Words."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--uri", f"http://me:{SECRET}@h"], "--uri: holds a password.*env:NAME or @FILE"),
        (["--env", f"{{hf_token: {SECRET}}}"], "--env: holds a password.*environment"),
        (["--env", f"{{x: [{{PASSWORD: {SECRET}}}]}}"], "--env: holds"),
        (["--options", f"X_TOKEN={SECRET}"], "--options: holds a password.*environment"),
    ],
)
def test_a_secret_on_a_command_line_is_refused_without_being_shown(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refused:
        parse(Deep, words, command="x")
    assert SECRET not in str(refused.value)


def test_a_secret_in_a_yaml_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(f"options: [a]\nuri: http://me:{SECRET}@h\n")
    with pytest.raises(ConfigError, match=r"site\.yaml:2: uri: holds a password") as refused:
        parse(Deep, ["--config", str(file)], command="x")
    assert SECRET not in str(refused.value)


def test_a_setting_made_in_python_is_written_without_its_secret() -> None:
    chosen = Deep(uri=f"http://me:{SECRET}@h", env={"HF_TOKEN": SECRET})
    assert SECRET not in dump(chosen) and SECRET not in str(flatten(chosen))


def test_a_recorded_setting_is_read_from_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "address").write_text(f"http://me:{SECRET}@h:1\n")
    (tmp_path / "address").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    chosen = parse(TrackingSettings, ["--uri", "@address"], command="x")
    (tmp_path / "config.yaml").write_text(dump(chosen))
    monkeypatch.chdir("/")
    again = load(TrackingSettings, tmp_path / "config.yaml")
    assert again == chosen and again.uri == f"@{tmp_path}/address"
    assert again.resolve_uri(tmp_path) == f"http://me:{SECRET}@h:1"
    assert redact(f"no such user: {SECRET}") == f"no such user: {MASK}", "what was read is known from then on"

    monkeypatch.setenv("MY_STORE", f"http://me:{SECRET}@h:2")
    assert TrackingSettings(uri="env:MY_STORE").resolve_uri(tmp_path) == f"http://me:{SECRET}@h:2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@h:3")
    assert TrackingSettings().recorded_uri(tmp_path) == "env:MLFLOW_TRACKING_URI"
    assert TrackingSettings().resolve_uri(tmp_path) == f"http://me:{SECRET}@h:3"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_secret_in_a_file_of_another_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(f"{SECRET}\r\n".encode(encoding))
    file.chmod(0o600)
    assert reveal(f"@{file}", "--key") == SECRET


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("env:NOT_THERE", "NOT_THERE is not set"),
        ("@/not/there", "cannot be read"),
        ("@{}/bytes", "not UTF-8"),
        ("@{}/two", "one word, has 2"),
    ],
)
def test_a_reference_to_nothing_is_one_line(tmp_path: Path, value: str, expected: str) -> None:
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "bytes").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ConfigError, match=expected):
        reveal(value.format(tmp_path), "--uri")


class Guarded(http.server.BaseHTTPRequestHandler):
    """An MLflow that lets nobody in, and says what it was shown."""

    shown: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.shown.append(self.headers.get("Authorization", ""))
        body = json.dumps({"error_code": "UNAUTHENTICATED", "message": f"not {self.headers['Authorization']}"}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Is quiet."""


def files_with(folder: Path, *secrets: str) -> list[str]:
    """The files below a folder with one of the secrets in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["variable", "file", "python"])
def test_nothing_that_a_run_leaves_holds_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], way: str
) -> None:
    """Recorded while it runs, synced to the server, refused there, and synced into another store."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://me:{SECRET}@127.0.0.1:{server.server_address[1]}"
    secrets = (SECRET, base64.b64encode(f"me:{SECRET}".encode()).decode())
    if way == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        chosen = TrackingSettings(mlflow=True)
    elif way == "file":
        (tmp_path / "address").write_text(uri)
        chosen = TrackingSettings(mlflow=True, uri=f"@{tmp_path}/address")
    else:
        chosen = TrackingSettings(mlflow=True, uri=uri)
    run = tmp_path / "runs" / "one"
    Guarded.shown.clear()
    with Tracker.open(run, chosen) as tracker:
        tracker.timeout_s = 240  # until the first try has failed
        tracker.start("tune", flatten(chosen) | {"endpoint": f"http://a:{SECRET}@b"}, {"line": f"x --token={SECRET}"})
        assert tracker.live_sync is not None
        command = Path(f"/proc/{tracker.live_sync.pid}/cmdline").read_bytes()
        assert SECRET.encode() not in command, "others see it in ps"
        tracker.event("note", error=f"GET http://me:{SECRET}@h failed")
        tracker.log(1, loss=1.0)
    assert Guarded.shown and Guarded.shown[0].endswith(secrets[1]), "the server was shown it"
    assert stat.S_IMODE((run / "mlflow.json").stat().st_mode) == 0o600
    code = main(["sync", str(run)])
    assert code == 2, "it goes to where the run was told to go, and is refused"
    server.shutdown()
    if way == "variable":  # making a store takes seconds
        sync(run, f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert files_with(tmp_path / "runs", *secrets) == []
    captured = capfd.readouterr()
    assert not any(secret in captured.out + captured.err for secret in secrets)
    assert "lavic sync" in captured.err
    (start,) = read_events(run / "metrics.jsonl", "start")
    expected = {"variable": "env:MLFLOW_TRACKING_URI", "file": f"@{tmp_path}/address"}
    assert start["uri"] == expected.get(way, uri.replace(f"me:{SECRET}", MASK))


def test_a_traceback_of_ours_holds_no_secret(tmp_path: Path) -> None:
    code = (
        "import sys, lavic.launch.sync as module, lavic.cli as cli\n"
        f"def broken(argv): raise RuntimeError('http://me:{SECRET}@h')\n"
        "module.main = broken\nsys.argv = ['lavic', 'sync', 'x']\ncli.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "RuntimeError" in done.stderr and MASK in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_an_evaluation_with_a_password_on_its_command_line_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://me:{SECRET}@127.0.0.1:{closed.getsockname()[1]}"
    words = ["--bundle", "b", "--store", "s", "--test", "t", "--tracking.uri", uri, "--out", str(tmp_path / "out")]
    assert main(["evaluate", *words]) == 2
    captured = capsys.readouterr()
    assert "--tracking.uri: holds a password" in captured.err and SECRET not in captured.out + captured.err
    assert not list(tmp_path.iterdir())
