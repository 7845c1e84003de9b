"""A connection to Ray: to the given cluster, or to one started on this machine for the length of the job."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from lavic.config import settings
from lavic.errors import LaunchError, first_line

log = logging.getLogger(__name__)

_STORE_BYTES = 128 << 20
"""Size of the object store. It holds only table rows, no photos, and must fit into a container's /dev/shm."""

_CLUSTER_START_S = 180.0
"""Seconds to wait for the nodes of a cluster that is starting."""


@settings
class RaySettings:
    """Where the job runs."""

    address: str | None = None
    """A running cluster: `auto` for this machine's, HOST:PORT, or `ray://HOST:PORT`. By default the one in RAY_ADDRESS,
    which `ray job submit` and the batch scripts set; without it a job that needs Ray starts one on this machine. All
    machines of a cluster need the same version of lavic, and the output folder under the same path."""
    nodes: int = Field(default=1, ge=1)
    """Nodes to wait for before the job begins; those of a batch job join one after the other."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs of this machine to use, for a Ray that is started here or for local workers; by default all."""
    workers: int | None = Field(default=None, ge=1)
    """Shards made in parallel; by default one per CPU. For `describe` and `embed`: ranks, each with a GPU."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Connects to Ray, or starts it, and disconnects after the block; an existing connection of this process is kept.

    Raises:
        LaunchError: Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Errors come as exceptions; Ray's own warnings would only hide our messages.
    warnings.filterwarnings("ignore", module=r"ray(\.|$)")
    import ray
    from ray.data import DataContext

    address = settings.address or os.environ.get("RAY_ADDRESS") or None
    context = DataContext.get_current()
    # Our own progress display replaces Ray's.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    try:
        if address:
            join_cluster(address, settings.nodes)
        else:
            ray.init(
                address="local",
                num_cpus=settings.cpus,
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:
        # Ray raises various types, and a bare Exception on a timeout.
        action = f"reach Ray at {address}" if address else "start Ray on this machine"
        hint = (
            "check that it runs and that you have its token (RAY_AUTH_MODE=token, ~/.ray/auth_token or RAY_AUTH_TOKEN)"
            if address
            else "see 'lavic doctor --ray'"
        )
        raise LaunchError(f"cannot {action} ({first_line(error)}); {hint}") from None
    try:
        yield
    finally:
        ray.shutdown()


def join_cluster(address: str, nodes: int) -> None:
    """Connects to a cluster; waits for one that is to have several nodes, which may just be starting.

    Raises:
        ConnectionError: There is no cluster.
        TimeoutError: Nodes are missing.
    """
    import ray

    deadline = time.monotonic() + (_CLUSTER_START_S if nodes > 1 else 0)
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            break
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    while len(alive := [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]) < nodes:
        if time.monotonic() > deadline:
            ray.shutdown()
            raise TimeoutError(
                f"{len(alive)} of {nodes} nodes joined within {_CLUSTER_START_S:.0f} s: {', '.join(alive)}"
            )
        time.sleep(1)
    log.info("%d Ray nodes: %s", len(alive), ", ".join(alive))


def actor_beside_driver(actor: type, *args: Any, **options: Any) -> Any:
    """Starts an actor of a class on the driver's node, so that the loss of another node does not end it.

    `args` are those of the class, `options` those of the Ray actor, besides those set here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    kind = ray.remote(actor).options(num_cpus=0, max_restarts=-1, scheduling_strategy=this_node, **options)
    return kind.remote(*args)
