"""MLflow stores: their URIs, and the SQLite store that is created where there is no server."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lavic.config.secrets import redact
from lavic.errors import LaunchError
from lavic.storage.file_lock import FileLock

NOT_INSTALLED = "MLflow is not installed; install it with: pip install 'lavic[mlflow]'"
_SPECIAL = re.compile("[%?#\udc80-\udcff]")
"""Characters of a path that have a meaning in a database URL, or that are not text."""
_LOCK_TIMEOUT_S = 120.0
"""Making a store, or a run in it, takes seconds."""


def default_store_uri(folder: Path) -> str:
    """The URI of a folder's own store, mlflow.db; symbolic links are resolved, so that one folder has one store."""
    return sqlite_uri(folder.resolve() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The URI of the SQLite store in a file.

    SQLAlchemy 2.0 and 2.1 quote a database's name differently, and MLflow makes the parent folder of what follows
    `sqlite:///` without unquoting it. Neither changes SQLite's own `file:` URI behind `sqlite+pysqlite:`.

    Raises:
        LaunchError: The path needs quoting and mlflow, which brings SQLAlchemy, is not installed.
    """
    path = path.absolute()
    if not _SPECIAL.search(str(path)):
        return f"sqlite:///{path}"
    try:
        from sqlalchemy import URL
    except ModuleNotFoundError:
        raise LaunchError(NOT_INSTALLED) from None
    url = URL.create("sqlite+pysqlite", database=path.as_uri(), query={"uri": "true"})
    return url.render_as_string(hide_password=False)


def absolute_uri(uri: str) -> str:
    """A URI, or a `@FILE` that holds one, with its path made absolute; symbolic links stay."""
    if uri.startswith("@"):
        return f"@{Path(uri[1:]).expanduser().absolute()}"
    if Path(uri).parts[:1] == ("..",) or uri.startswith("./"):
        return str(Path(uri).absolute())
    path = sqlite_path(uri)
    return uri if path is None or "?" in uri else sqlite_uri(path)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other URI, and for a database in memory."""
    if not uri.startswith("sqlite"):
        return None
    if uri.startswith("sqlite:///") and not _SPECIAL.search(uri):
        name = uri.removeprefix("sqlite:///")
    else:
        try:
            from sqlalchemy import make_url
            from sqlalchemy.exc import ArgumentError
        except ModuleNotFoundError:
            return None
        try:
            url = make_url(uri)
        except (ArgumentError, ValueError):
            return None
        name = url.database or ""
        if url.query.get("uri") == "true":
            name = unquote(urlsplit(name).path, errors="surrogateescape")
    return Path(name).absolute() if name and name != ":memory:" else None


def store_key(uri: str) -> str:
    """A key of a store that is the same for every spelling of its URI, and holds no secret.

    The key of a key is itself.
    """
    path = Path(uri.removeprefix("sqlite:")) if uri.startswith("sqlite:/") and uri[8:9] != "/" else sqlite_path(uri)
    if path is not None:
        return f"sqlite:{path.resolve()}"
    return re.sub(r"^(https?://)[^/@]*@", r"\1", redact(uri)).rstrip("/")


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Keeps other processes of this machine from making the same store, or the same run in it, at the same time.

    Raises:
        LaunchError: Another process has held the lock for two minutes.
    """
    path = sqlite_path(uri)
    if path is not None:
        path = path.with_name(f".{path.name}.lock")
    else:
        digest = hashlib.sha256(store_key(uri).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"lavic-mlflow-{os.getuid()}-{digest}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a lock, nobody is kept out
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(FileLock(path))
            if not lock.acquire(_LOCK_TIMEOUT_S):
                waited = f"has been setting up this store for {_LOCK_TIMEOUT_S:.0f} s"
                raise LaunchError(f"{redact(uri)}: another process {waited}: end the process that holds {path}")
        yield


def artifacts_uri(store: Path) -> str:
    """Where a SQLite store keeps artifacts. MLflow's default is below the folder that the process runs in."""
    return (store.parent / "mlartifacts").as_uri()


def create_if_missing(path: Path) -> None:
    """Makes a store in a folder aside and moves the complete file into place, so that no process sees part of it.

    Raises:
        LaunchError: The file is not an MLflow store, or an incomplete one.
    """
    if _has_content(path):
        _check(path)
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with store_lock(sqlite_uri(path)):
        if _has_content(path):
            return
        affixes = f".{path.name}.", ".part"
        for leftover in path.parent.glob(glob.escape(affixes[0]) + "*" + affixes[1]):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(affixes[1], affixes[0], path.parent) as folder:
            part = Path(folder) / path.name
            SqlAlchemyStore(sqlite_uri(part), artifacts_uri(path)).engine.dispose()
            if path.exists():  # an empty file
                part.replace(path)
                return
            try:
                os.link(part, path)
            except FileExistsError:  # made on another machine, which the lock does not reach
                pass
            except OSError:  # the file system has no hard links
                part.replace(path)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _check(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            database.execute("SELECT version_num FROM alembic_version")
        return
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            return  # locked, or not readable: MLflow reports it
    except sqlite3.DatabaseError:
        pass
    raise LaunchError(
        f"{path}: not a complete MLflow store; move it away, then `lavic sync` fills a new one from the runs' journals"
    )
