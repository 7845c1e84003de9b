"""A bad node is found before the job starts, and named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lavic.cli import main
from lavic.distributed.launcher_env import free_port
from lavic.errors import LavicError
from lavic.launch.preflight.inventory import data_digest, memory_problems, read_gpu_table
from lavic.launch.preflight.report import PreflightReport
from tests.slurm.slurm_jobs import Slurm
from tests.slurm.test_train import SCRIPTS, settings

NODES = ("a", "b", "c")
FACTS = {"code": "1", "packages": {"torch": "2.13.0"}, "data": {"shards": "x"}}


def findings(nodes: Sequence[str] = NODES, **changed: list[dict[str, Any]]) -> list[str]:
    """What nodes say, all well but for the changes."""
    lines = []
    for node in nodes:
        well = [
            {"check": "node", "problems": [], "notes": [], "facts": FACTS},
            {"check": "all_reduce", "ok": True, "bytes_per_s": 1e9, "seconds": 3.0, "why": ""},
            {"check": "end"},
        ]
        lines += [json.dumps({"node": node, **line}) for line in changed.get(node, well)]
    return lines


def conclude(lines: Sequence[str], capsys: pytest.CaptureFixture[str], nodes: Sequence[str] = NODES) -> tuple[int, str]:
    report = PreflightReport(nodes)
    report.read(lines)
    return report.conclude(), capsys.readouterr().out


def node_check(problems: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
    return {"check": "node", "problems": list(problems), "notes": [], "facts": {**FACTS, **facts}}


def failed(check: str = "all_reduce", **more: Any) -> dict[str, Any]:
    return {"check": check, "ok": False, "bytes_per_s": 0.0, "seconds": 9.0, "why": "no answer", **more}


END = {"check": "end"}


def test_all_well(capsys):
    code, output = conclude(["not ours", *findings()], capsys)
    assert code == 0 and output == "preflight: 3 nodes passed; all-reduce in 3 s with start-up, 1.00 GB/s\n"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "no answer"),
        ([node_check()], "hangs in the all-reduce"),
        ([node_check(["7 of 8 GPUs visible"]), END], "7 of 8 GPUs visible"),
        ([node_check(code="2"), END], "the code of lavic differs from the other nodes"),
        ([node_check(packages={"torch": "2.9.0"}), END], "torch differs from the other nodes (2.9.0, there 2.13.0)"),
        ([node_check(packages={}), END], "torch is missing"),
        ([node_check(data={"shards": "missing"}), END], "shards is missing"),
        (
            [node_check(), {"check": "link", "why": "cannot connect to a:1 on the first node"}, END],
            "cannot connect to a:1",
        ),
    ],
)
def test_one_bad_node_is_named(lines, reason, capsys):
    code, output = conclude(findings(b=lines), capsys)
    assert code == 1
    assert f"preflight: b: {reason}" in output or (output.startswith("preflight: b: ") and reason in output)
    assert output.endswith("1 of 3 nodes failed; exclude it with --exclude=b\n")


def test_the_node_that_breaks_the_all_reduce_is_named(capsys):
    """All fail together; in pairs, only those with c."""

    def pair(other: str, ok: bool) -> dict[str, Any]:
        return {**failed("pair"), "ok": ok, "other": other}

    changed = {
        "a": [node_check(), failed(), pair("b", True), END],
        "b": [node_check(), failed(), pair("a", True), pair("c", False), END],
        "c": [node_check(), failed(), pair("b", False), END],
    }
    code, output = conclude(findings(**changed), capsys)
    assert code == 1 and "--exclude=c" in output and "no all-reduce with its neighbours" in output


def test_no_node_is_named_without_a_reason(capsys):
    changed = {node: [node_check(), failed(), END] for node in NODES}
    with pytest.raises(LavicError, match="it is not clear which node is at fault"):
        conclude(findings(**changed), capsys)


def test_of_two_nodes_that_differ_neither_is_named(capsys):
    two = ("a", "b")
    for changed in (
        [node_check(packages={"torch": "2.9.0"}), END],
        [node_check(code="2"), END],
        [node_check(data={"shards": "y"}), END],
        [node_check(driver=["570"]), END],
        [node_check(), {"check": "link", "why": "cannot connect to a:1 on the first node"}, END],
        [node_check(), failed(), END],
    ):
        changes = {"b": changed, "a": [node_check(driver=["580"]), END]} if "driver" in str(changed) else {"b": changed}
        with pytest.raises(LavicError, match="it is not clear which node is at fault"):
            conclude(findings(two, **changes), capsys, two)
        assert "--exclude" not in capsys.readouterr().out


def test_what_one_of_two_nodes_lacks_is_that_node_s_fault(capsys):
    code, output = conclude(findings(("a", "b"), a=[node_check(data={"shards": "missing"}), END]), capsys, ("a", "b"))
    assert code == 1 and "preflight: a: shards is missing" in output and output.endswith("--exclude=a\n")


def test_the_first_node_is_named_when_no_other_can_connect_to_it(capsys):
    link = [node_check(), {"check": "link", "why": "cannot connect to a:1"}, END]
    code, output = conclude(findings(b=link, c=link), capsys)
    assert code == 1 and output.endswith("--exclude=a\n") and "no other node can connect to it" in output


def test_what_nvidia_smi_says():
    table = (
        "0, NVIDIA H100, 570.86.15, 81559, 81000, 0\n"
        "1, NVIDIA H100, 570.86.15, 81559, 40000, 0\n"
        "2, NVIDIA H100, 570.86.15, 81559, 81000, 3\n"
        "3, NVIDIA H100, 570.86.15, 81559, 81000, [N/A]\n"
    )
    facts: dict[str, Any] = {}
    bad = list(read_gpu_table(table, facts))
    assert bad == ["GPU 1: 39 of 80 GiB free: another process uses it", "GPU 2: 3 uncorrected memory errors"]
    assert facts == {"gpus": ["NVIDIA H100"], "driver": ["570.86.15"], "gpu_free_mib": 40000}


@pytest.mark.parametrize(
    ("visible", "bad", "free"),
    [
        ("0", [], 81000),
        ("1,0", ["GPU 1"], 40000),
        ("GPU-bbb", ["GPU 1"], 40000),
        ("0,-1,1", [], 81000),
        ("", [], 0),
        ("MIG-1234", [], 0),
    ],
)
def test_only_the_gpus_of_this_job_are_looked_at(visible, bad, free):
    """The node's second GPU belongs to another job."""
    gpu_line = "0, NVIDIA H100, 570.86.15, 81559, 81000, 0, GPU-aaaa-1\n"
    table = gpu_line + "1, NVIDIA H100, 570.86.15, 81559, 40000, 0, GPU-bbbb-2\n"
    facts: dict[str, Any] = {}
    assert [line.partition(":")[0] for line in read_gpu_table(table, facts, visible)] == bad
    assert facts["gpu_free_mib"] == free


def test_memory_that_is_left(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684120 kB\nMemFree:        1000 kB\nMemAvailable:    2097152 kB\n")
    assert list(memory_problems(2.0, meminfo)) == []
    assert list(memory_problems(2.5, meminfo)) == ["2.0 of 23.5 GiB of memory free, 2.5 required"]
    assert list(memory_problems(2.5, tmp_path / "none")) == []


def check_ray_ports(port: int, within: int, second: str = "127.0.0.1") -> list[str]:
    """What two nodes say that are to run Ray."""
    words = ["--probe", "--kind", "ray", "--nodes", "a", "b", "--addresses", "127.0.0.1", second, "--port", str(port)]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "lavic", "preflight", *words, "--within", str(within)],
            env={**os.environ, "SLURMD_NODENAME": node},
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in ("a", "b")
    ]
    return [line for node in nodes for line in node.communicate(timeout=60)[0].splitlines()]


@pytest.mark.slow
def test_ray_s_ports_are_tried_both_ways(capsys):
    report = PreflightReport(("a", "b"))
    report.read(check_ray_ports(free_port(), 30))
    assert report.conclude() == 0, capsys.readouterr().out

    # an address that no packet leaves for
    report = PreflightReport(("a", "b"))
    report.read(check_ray_ports(free_port(), 8, second="0.0.0.1"))
    with pytest.raises(
        LavicError, match=r"a and b cannot connect to each other .b: the first node cannot connect to its port"
    ):
        report.conclude()

    with socket.create_server(("", 0)) as taken:
        report = PreflightReport(("a", "b"))
        report.read(check_ray_ports(taken.getsockname()[1], 8))
    assert report.conclude() == 1
    output = capsys.readouterr().out
    assert "preflight: a: port" in output and "RAY_PORT" in output and output.endswith("--exclude=a\n")


def test_data_that_differ_have_another_digest(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert data_digest(file) == "missing"
    file.write_text("a" * 3_000_000)
    before = data_digest(file)
    file.write_text("a" * 2_999_999 + "b")
    assert data_digest(file) != before
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    before = data_digest(folder)
    (folder / "photos.tar").write_text("x")
    assert data_digest(folder) == before  # a running crawl writes to it
    (folder / "manifest.json").write_text("{ }")
    assert data_digest(folder) != before


@pytest.mark.dist
def test_this_machine(monkeypatch, capsys):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")
    assert main(["preflight", "--ranks", "2", "--within", "300"]) == 0
    assert "1 node passed; all-reduce in" in capsys.readouterr().out


@pytest.mark.slurm
def test_a_node_that_hangs_is_named_and_nothing_starts(slurm: Slurm, tmp_path: Path) -> None:
    """What stands before every program hangs on the second node."""
    hang = tmp_path / "hang.sh"
    hang.write_text('#!/bin/bash\n[[ $SLURMD_NODENAME == n2 ]] && sleep 600\nexec "$@"\n')
    hang.chmod(0o755)
    more = settings(LAVIC_PREFLIGHT="20", LAVIC_PREFIX=str(hang))
    job = slurm.submit("--nodes=2", SCRIPTS / "cpu.sbatch", "doctor", cwd=tmp_path, **more)
    assert job.wait() == 1, job.log
    assert "preflight: n2: no answer: it hangs" in job.log
    assert "--exclude=n2" in job.log
    assert "python " not in job.log  # the doctor's first line


@pytest.mark.slurm
def test_missing_gpus_are_counted(slurm: Slurm, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    more = {**settings(LAVIC_PREFLIGHT="120"), "LAVIC_DEVICE": ""}
    job = slurm.submit("--nodes=1", SCRIPTS / "gpu.sbatch", "evaluate", cwd=tmp_path, **more)
    assert job.wait() == 1, job.log
    assert "preflight: n1: 0 of 8 GPUs visible" in job.log and "--exclude=n1" in job.log
