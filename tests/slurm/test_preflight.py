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
from lavic.launch.preflight.command import Judge
from lavic.launch.preflight.inventory import digest, memory, read_cards
from tests.slurm.slurm_jobs import Slurm
from tests.slurm.test_train import SCRIPTS, settings

NODES = ("a", "b", "c")
FACTS = {"code": "1", "packages": {"torch": "2.13.0"}, "data": {"shards": "x"}}


def findings(nodes: Sequence[str] = NODES, **changed: list[dict[str, Any]]) -> list[str]:
    """What nodes say, all well but for the changes."""
    lines = []
    for node in nodes:
        well = [
            {"what": "look", "bad": [], "notes": [], "facts": FACTS},
            {"what": "reduce", "right": True, "bytes_per_s": 1e9, "seconds": 3.0, "why": ""},
            {"what": "end"},
        ]
        lines += [json.dumps({"node": node, **line}) for line in changed.get(node, well)]
    return lines


def judged(lines: Sequence[str], capsys: pytest.CaptureFixture[str], nodes: Sequence[str] = NODES) -> tuple[int, str]:
    judge = Judge(nodes)
    judge.listen(lines)
    return judge.conclude(), capsys.readouterr().out


def look(bad: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
    return {"what": "look", "bad": list(bad), "notes": [], "facts": {**FACTS, **facts}}


def failed(what: str = "reduce", **more: Any) -> dict[str, Any]:
    return {"what": what, "right": False, "bytes_per_s": 0.0, "seconds": 9.0, "why": "no answer", **more}


END = {"what": "end"}


def test_all_well(capsys):
    code, said = judged(["not ours", *findings()], capsys)
    assert code == 0 and said == "preflight: 3 nodes well; all-reduce in 3 s with start-up, 1.00 GB/s\n"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "said nothing"),
        ([look()], "hangs in the all-reduce"),
        ([look(["7 of 8 GPUs seen"]), END], "7 of 8 GPUs seen"),
        ([look(code="2"), END], "the code of lavic is not that of the others"),
        ([look(packages={"torch": "2.9.0"}), END], "torch is not that of the others (2.9.0, 2.13.0)"),
        ([look(packages={}), END], "torch is missing"),
        ([look(data={"shards": "gone"}), END], "shards is missing"),
        ([look(), {"what": "link", "why": "cannot reach a:1 on the first node"}, END], "cannot reach a:1"),
    ],
)
def test_one_bad_node_is_named(lines, reason, capsys):
    code, said = judged(findings(b=lines), capsys)
    assert code == 1
    assert f"preflight: b: {reason}" in said or (said.startswith("preflight: b: ") and reason in said)
    assert said.endswith("1 of 3 nodes will not do; leave out with: --exclude=b\n")


def test_who_is_in_the_way_of_the_all_reduce(capsys):
    """All fail together; in pairs, only those with c."""

    def pair(other: str, right: bool) -> dict[str, Any]:
        return {**failed("pair"), "right": right, "with": other}

    changed = {
        "a": [look(), failed(), pair("b", True), END],
        "b": [look(), failed(), pair("a", True), pair("c", False), END],
        "c": [look(), failed(), pair("b", False), END],
    }
    code, said = judged(findings(**changed), capsys)
    assert code == 1 and "--exclude=c" in said and "no all-reduce with its neighbours" in said


def test_nobody_is_blamed_without_a_reason(capsys):
    changed = {node: [look(), failed(), END] for node in NODES}
    with pytest.raises(LavicError, match="cannot be told"):
        judged(findings(**changed), capsys)


def test_of_two_nodes_that_differ_neither_is_blamed(capsys):
    two = ("a", "b")
    for changed in (
        [look(packages={"torch": "2.9.0"}), END],
        [look(code="2"), END],
        [look(data={"shards": "y"}), END],
        [look(driver=["570"]), END],
        [look(), {"what": "link", "why": "cannot reach a:1 on the first node"}, END],
        [look(), failed(), END],
    ):
        changes = {"b": changed, "a": [look(driver=["580"]), END]} if "driver" in str(changed) else {"b": changed}
        with pytest.raises(LavicError, match="which node is at fault cannot be told"):
            judged(findings(two, **changes), capsys, two)
        assert "--exclude" not in capsys.readouterr().out


def test_what_one_of_two_nodes_lacks_is_that_node_s_fault(capsys):
    code, said = judged(findings(("a", "b"), a=[look(data={"shards": "gone"}), END]), capsys, ("a", "b"))
    assert code == 1 and "preflight: a: shards is missing" in said and said.endswith("--exclude=a\n")


def test_the_first_node_is_blamed_when_no_other_reaches_it(capsys):
    link = [look(), {"what": "link", "why": "cannot reach a:1"}, END]
    code, said = judged(findings(b=link, c=link), capsys)
    assert code == 1 and said.endswith("--exclude=a\n") and "no other node reaches it" in said


def test_what_nvidia_smi_says():
    table = (
        "0, NVIDIA H100, 570.86.15, 81559, 81000, 0\n"
        "1, NVIDIA H100, 570.86.15, 81559, 40000, 0\n"
        "2, NVIDIA H100, 570.86.15, 81559, 81000, 3\n"
        "3, NVIDIA H100, 570.86.15, 81559, 81000, [N/A]\n"
    )
    facts: dict[str, Any] = {}
    bad = list(read_cards(table, facts))
    assert bad == ["GPU 1: 39 of 80 GiB free: another process is on it", "GPU 2: 3 uncorrected memory errors"]
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
    mine = "0, NVIDIA H100, 570.86.15, 81559, 81000, 0, GPU-aaaa-1\n"
    table = mine + "1, NVIDIA H100, 570.86.15, 81559, 40000, 0, GPU-bbbb-2\n"
    facts: dict[str, Any] = {}
    assert [line.partition(":")[0] for line in read_cards(table, facts, visible)] == bad
    assert facts["gpu_free_mib"] == free


def test_memory_that_is_left(tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       24684120 kB\nMemFree:        1000 kB\nMemAvailable:    2097152 kB\n")
    assert list(memory(2.0, told)) == []
    assert list(memory(2.5, told)) == ["2.0 of 23.5 GiB of memory free, 2.5 wanted"]
    assert list(memory(2.5, tmp_path / "none")) == []


def look_at_ray(port: int, within: int, second: str = "127.0.0.1") -> list[str]:
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


def test_ray_s_ports_are_tried_both_ways(capsys):
    judge = Judge(("a", "b"))
    judge.listen(look_at_ray(free_port(), 30))
    assert judge.conclude() == 0, capsys.readouterr().out

    # an address that no packet leaves for
    judge = Judge(("a", "b"))
    judge.listen(look_at_ray(free_port(), 8, second="0.0.0.1"))
    with pytest.raises(LavicError, match=r"a and b do not reach each other .b: the first node cannot reach its port"):
        judge.conclude()

    with socket.create_server(("", 0)) as taken:
        judge = Judge(("a", "b"))
        judge.listen(look_at_ray(taken.getsockname()[1], 8))
    assert judge.conclude() == 1
    said = capsys.readouterr().out
    assert "preflight: a: port" in said and "RAY_PORT" in said and said.endswith("--exclude=a\n")


def test_data_that_differ_have_another_digest(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert digest(file) == "gone"
    file.write_text("a" * 3_000_000)
    before = digest(file)
    file.write_text("a" * 2_999_999 + "b")
    assert digest(file) != before
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    before = digest(folder)
    (folder / "photos.tar").write_text("x")
    assert digest(folder) == before  # a running crawl writes to it
    (folder / "manifest.json").write_text("{ }")
    assert digest(folder) != before


@pytest.mark.dist
def test_this_machine(monkeypatch, capsys):
    monkeypatch.setenv("LAVIC_DEVICE", "cpu")
    assert main(["preflight", "--ranks", "2", "--within", "300"]) == 0
    assert "1 node well; all-reduce in" in capsys.readouterr().out


@pytest.mark.slurm
def test_a_node_that_hangs_is_named_and_nothing_starts(slurm: Slurm, tmp_path: Path) -> None:
    """What stands before every program hangs on the second node."""
    hang = tmp_path / "hang.sh"
    hang.write_text('#!/bin/bash\n[[ $SLURMD_NODENAME == n2 ]] && sleep 600\nexec "$@"\n')
    hang.chmod(0o755)
    more = settings(LAVIC_PREFLIGHT="20", LAVIC_PREFIX=str(hang))
    job = slurm.submit("--nodes=2", SCRIPTS / "cpu.sbatch", "doctor", cwd=tmp_path, **more)
    assert job.wait() == 1, job.log
    assert "preflight: n2: said nothing: it hangs" in job.log
    assert "--exclude=n2" in job.log
    assert "python " not in job.log  # the doctor's first line


@pytest.mark.slurm
def test_missing_gpus_are_counted(slurm: Slurm, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    more = {**settings(LAVIC_PREFLIGHT="120"), "LAVIC_DEVICE": ""}
    job = slurm.submit("--nodes=1", SCRIPTS / "evaluate.sbatch", "evaluate", cwd=tmp_path, **more)
    assert job.wait() == 1, job.log
    assert "preflight: n1: 0 of 8 GPUs seen" in job.log and "--exclude=n1" in job.log
