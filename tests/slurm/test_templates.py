"""The batch scripts as files: shellcheck, bash and SLURM itself accept them, and nothing of a site is in them."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from lavic.distributed.launcher_env import free_port
from tests.slurm.slurm_jobs import Slurm

FOLDER = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
ALL = [*SCRIPTS, *sorted(FOLDER.glob("*.sh"))]


def options(script: Path) -> dict[str, str]:
    """Its #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", script.read_text(), re.M))


def test_there_are_as_few_as_the_resources_allow():
    names = {script.stem for script in SCRIPTS}
    assert names == {"cpu", "crawl", "describe", "gpu", "serve"}


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
def test_bash_reads_it(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here: apt-get install shellcheck")
@pytest.mark.slow
def test_shellcheck_finds_nothing():
    words = ["shellcheck", "--external-sources", *(str(script.relative_to(FOLDER.parent)) for script in ALL)]
    done = subprocess.run(words, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_each_asks_for(script):
    directives = options(script)
    assert {"nodes", "cpus-per-task", "time", "requeue"} <= directives.keys()
    assert directives["open-mode"] == "append" and directives["output"] == "lavic-%j.log"
    if script.stem != "cpu":
        assert re.fullmatch(r"B:USR1@\d+", directives["signal"])
    # Said once: everything behind the header takes it from SLURM.
    body = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in body if re.search(r"--(nodes|gpus|ntasks|time|partition|account)\b", line)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_names_that_env_sets_can_be_set_from_outside(script):
    lines = (FOLDER / "env.sh").read_text().splitlines()
    set_here = [line for line in lines if line and not line.startswith("#")]
    assert set_here and all(re.match(r': "\$\{[A-Z_]+:=.*\}"$', line) for line in set_here)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.0.0.2"])
def test_a_port_that_something_listens_on_is_not_taken(host):
    with socket.socket() as taken:
        taken.bind((host, free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        function = re.search(r"^free_port\(\) \{.*?^\}", (FOLDER / "job.sh").read_text(), re.DOTALL | re.MULTILINE)
        lines = f"set -euo pipefail\nfirst_address() {{ echo 127.0.0.2; }}\n{function[0]}\nfree_port {port}"
        done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert int(done.stdout) > port


@pytest.mark.slurm
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_would_take_it(slurm: Slurm, script, tmp_path):
    done = slurm.run("sbatch", "--test-only", script, "word", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"using {int(options(script)['cpus-per-task']) * int(options(script)['nodes'])} processors" in done.stderr
