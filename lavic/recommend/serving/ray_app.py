"""The server on Ray Serve: the same app and recommender as a deployment of several replicas, on one machine or many.

`app` is what a file for `serve deploy` names; `configs/serve-ray.yaml` is one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from lavic.distributed.ray_session import join_cluster
from lavic.errors import LaunchError, LavicError, first_line
from lavic.model.bundle import BundleInfo
from lavic.model.item_store import ItemStore
from lavic.recommend.candidates import CandidateSearch
from lavic.recommend.serve_settings import ServeSettings, check_settings, read_token
from lavic.recommend.serving.app import create_app
from lavic.recommend.serving.metrics import Metrics
from lavic.recommend.serving.ray_metrics import RayInstruments
from lavic.recommend.serving.service import Served, load_served

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

NAME = "lavic"
"""Name of the application."""
_GRACE_S = 5.0
"""Seconds that Ray waits for an answer beyond the app's own deadline."""


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application, as `serve deploy` builds it from a file's `args`.

    Args:
        args: Settings of `lavic serve`. `host` and `port` are Ray's own, in the file's `http_options`; everything else
            counts. Paths must be the same on every node. A token is a reference that each replica resolves for itself.
    """
    return application(ServeSettings(**args))


def application(chosen: ServeSettings, generation: int = 0) -> serve.Application:
    """The deployment of the settings.

    Args:
        chosen: Settings.
        generation: Another number makes Ray replace the replicas one after the other.
    """

    def build() -> FastAPI:
        return replica_app(chosen)

    scale = chosen.scale
    max_replicas = scale.max_replicas or scale.replicas
    size: dict[str, Any] = {"num_replicas": scale.replicas}
    if max_replicas > scale.replicas:
        limits = {"min_replicas": scale.replicas, "initial_replicas": scale.replicas, "max_replicas": max_replicas}
        size = {"autoscaling_config": {**limits, "target_ongoing_requests": scale.target_requests}}
    deployment = serve.deployment(
        name="Recommender",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=chosen.queue + chosen.batch_size,
        graceful_shutdown_timeout_s=chosen.deadline,
        **size,
    )(serve.ingress(build)())
    bound: serve.Application = deployment.bind(generation)
    return bound


def replica_app(chosen: ServeSettings) -> FastAPI:
    """The app of one replica, which loads the recommender when it starts."""
    check_settings(chosen)

    async def load() -> Served:
        return await asyncio.get_running_loop().run_in_executor(None, load_served, chosen)

    return create_app(chosen, read_token(chosen), load, Metrics(RayInstruments()))


def run(chosen: ServeSettings) -> None:
    """Serves until SIGTERM, SIGINT or SIGUSR1; SIGHUP replaces the replicas one after the other.

    Raises:
        ConfigError, DataError: Bundle, store and index are not there or do not belong together.
        LaunchError: Ray or a replica does not start.
    """
    _check(chosen)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its workers at niceness 15: a request then waits for every other busy process of the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = chosen.scale.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            join_cluster(address, chosen.scale.nodes)
        else:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises various types
        raise LaunchError(f"cannot start or reach Ray at {address or 'this machine'} ({first_line(error)})") from None
    try:
        _serve(chosen, local=not address)
    finally:
        ray.shutdown()


def _serve(chosen: ServeSettings, *, local: bool) -> None:
    port = chosen.port or _free_port(chosen.host)
    signalled, stop, reload = threading.Event(), threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        (reload if number == signal.SIGHUP else stop).set()
        signalled.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, on_signal)
    options = {"host": chosen.host, "port": port, "request_timeout_s": chosen.deadline + _GRACE_S}
    try:
        serve.start(proxy_location="EveryNode", http_options=options, logging_config={"log_level": "WARNING"})
    except Exception as error:  # Ray raises various types
        raise LaunchError(f"Ray Serve does not start on {chosen.host}:{port} ({first_line(error)})") from None
    generation = 0
    try:
        _deploy(chosen, generation)
        print(f"metrics of all replicas, by Ray: {' '.join(_metrics_urls())}")
        print(f"serving on http://{chosen.host}:{port}", flush=True)
        while not stop.is_set():
            signalled.wait()
            signalled.clear()
            if reload.is_set():
                reload.clear()
                try:
                    _check(chosen)  # Ray would stop a replica before the new one fails to load
                except LavicError as error:
                    log.error("not taken up: %s; the server keeps what it has", error)
                    continue
                generation += 1
                _deploy(chosen, generation)
                print("replicas replaced", flush=True)
    finally:
        if local:
            serve.shutdown()
        else:
            serve.delete(NAME)


def _check(chosen: ServeSettings) -> None:
    """Refuses a bundle, a store and an index that are not whole or do not belong together; loads no model."""
    info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
    info.check_adapters(chosen.bundle)
    info.check_store(store)
    if chosen.index is not None:
        CandidateSearch.open(chosen.index, store, chosen.methods, chosen.weights)


def _deploy(chosen: ServeSettings, generation: int) -> None:
    try:
        serve.run(application(chosen, generation), name=NAME, route_prefix="/")
    except Exception as error:  # Ray raises various types
        raise LaunchError(f"a replica does not start: {first_line(error)}; see `ray logs` and `serve status`") from None


def _metrics_urls() -> list[str]:
    """Where Ray exports the counters of each node's replicas."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])
