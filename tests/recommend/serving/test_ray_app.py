"""The server on Ray Serve: answers, metrics, a killed replica, reload."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from lavic.recommend.recommender import Recommender

from ..conftest import KEY, Assets
from .conftest import Server, serve

pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def exported_counter(server: Server, name: str, most: int, **labels: str) -> float:
    """The sum of a counter over all replicas, once Ray's export has reached it."""
    url = server.wait_for("metrics of all replicas").split()[-1]
    pattern = re.compile(rf"^{name}{{(.*)}} (\S+)$", re.MULTILINE)
    total = 0.0
    for _ in range(200):
        lines = pattern.findall(httpx.get(url, trust_env=False).text)
        total = sum(float(value) for tags, value in lines if all(f'{k}="{v}"' in tags for k, v in labels.items()))
        if total >= most:
            break
        time.sleep(0.5)
    return total


def test_replicas_answer_also_after_one_is_killed(assets: Assets, index: Path, tmp_path: Path):
    copied = tmp_path / "bundle"
    shutil.copytree(assets.bundle, copied)
    args = ("--bundle", copied, "--store", assets.store, "--index", index, "--retrieved", 20, "--ray")
    bodies = [
        {"conversation": c.turns[0].text, "candidates": list(c.candidates[KEY])} for c in assets.conversations[:8]
    ]
    recommender = Recommender.load(assets.bundle, assets.store, index, retrieved=20)
    with (
        serve(*args, "--scale.replicas", 2, "--scale.cpus", 0.5, env={"RAY_ADDRESS": ""}) as server,
        server.client() as client,
    ):

        def send(body: dict) -> httpx.Response:
            with server.client() as other:
                return other.post("/v1/recommend", json=body)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, bodies))
        for body, answer in zip(bodies, answers, strict=True):
            alone = recommender.recommend(body["conversation"], body["candidates"])
            items = answer.json()["items"]
            assert [item["id"] for item in items] == [item.id for item in alone]
            assert [item["probability"] for item in items] == pytest.approx([i.probability for i in alone], abs=1e-5)
        # a scrape of one replica would miss the others: Ray exports the counters of all
        assert client.get("/metrics").status_code == 404
        counted = exported_counter(server, "ray_lavic_requests_total", 8, route="/v1/recommend", status="200")
        assert counted == len(bodies) == 8
        malformed = client.post("/v1/recommend", json={"conversation": ""})
        assert malformed.status_code == 422 and malformed.json()["error"]["param"] == "conversation"
        chat = {"messages": [{"role": "user", "content": "an acme mug"}], "stream": True, "k": 2}
        lines = client.post("/v1/chat/completions", json=chat).text.split("\n\n")
        assert lines[-2] == "data: [DONE]" and json.loads(lines[0].removeprefix("data: "))["choices"]

        replicas = [
            process
            for process in psutil.Process(server.process.pid).children(recursive=True)
            if "servereplica" in " ".join(process.cmdline()).replace("_", "").lower()
        ]
        assert len(replicas) == 2
        # with Ray's default niceness of 15, other processes would delay the replicas
        assert [replica.nice() for replica in replicas] == [psutil.Process().nice()] * 2
        with ThreadPoolExecutor(8) as pool:
            sent = [pool.submit(send, body) for body in bodies * 3]
            replicas[0].kill()
            statuses = {answer.result().status_code for answer in sent}
        assert statuses <= {200, 500, 503} and 200 in statuses
        assert [send(body).status_code for body in bodies] == [200] * len(bodies)

        description = copied / "bundle.json"
        content = description.read_text("utf-8")
        description.write_text(content[: len(content) // 2], "utf-8")
        server.process.send_signal(signal.SIGHUP)
        assert str(description) in server.wait_for("not taken up")
        assert send(bodies[0]).status_code == 200
        assert server.stop() == 0
