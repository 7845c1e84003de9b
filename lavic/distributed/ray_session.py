"""A Ray to run jobs on: the cluster that was named, or one started here for the length of the job."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from lavic.config.loader import settings
from lavic.errors import LaunchError, first_line

log = logging.getLogger(__name__)

_STORE_BYTES = 128 << 20
"""Rows are a line each and photos never enter the object store: a small one does, and fits a container's /dev/shm."""

_PATIENCE_S = 180.0
"""For the nodes of a cluster that is starting."""


@settings
class RaySettings:
    """Where the job runs."""

    address: str | None = None
    """A running cluster: `auto` for this machine's, HOST:PORT, or `ray://HOST:PORT`. By default the one in RAY_ADDRESS,
    which `ray job submit` and the batch scripts set; without that a job that needs Ray starts one here. A cluster's
    machines need the same lavic, and the output folder under the same path."""
    nodes: int = Field(default=1, ge=1)
    """Begin when the cluster has so many nodes; those of a batch job come one after the other."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs of this machine to use, by a Ray that is started here or by local workers; by default all."""
    workers: int | None = Field(default=None, ge=1)
    """Shards that are made at once; by default one per CPU. For `describe` and `embed`: ranks, each with a GPU."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Connect to Ray, or start it here, and leave it again; one that this process already has is used and kept.

    Raises:
        LaunchError: Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's own words are about Ray, and in the way of ours: what stops a job is an exception.
    warnings.filterwarnings("ignore", module=r"ray(\.|$)")
    import ray
    from ray.data import DataContext

    address = settings.address or os.environ.get("RAY_ADDRESS") or None
    context = DataContext.get_current()
    # Our own line says more, and goes to a log as lines.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    try:
        if address:
            _join(address, settings.nodes)
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
        # Ray raises whatever its parts do, a bare Exception where they are slow.
        where = f"reach Ray at {address}" if address else "start Ray on this machine"
        mend = (
            "is it up, and have you its token (RAY_AUTH_MODE=token, ~/.ray/auth_token or RAY_AUTH_TOKEN)?"
            if address
            else "see 'lavic doctor --ray'"
        )
        raise LaunchError(f"cannot {where} ({first_line(error)}); {mend}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, nodes: int) -> None:
    """Connects to a cluster. One that is to have several nodes may just be starting: it is waited for."""
    import ray

    until = time.monotonic() + (_PATIENCE_S if nodes > 1 else 0)
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            break
        except ConnectionError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
    while len(here := [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]) < nodes:
        if time.monotonic() > until:
            ray.shutdown()
            raise TimeoutError(f"{len(here)} of {nodes} nodes came within {_PATIENCE_S:.0f} s: {', '.join(here)}")
        time.sleep(1)
    log.info("%d nodes of Ray: %s", len(here), ", ".join(here))


def actor_beside_driver(actor: type, *args: Any, **options: Any) -> Any:
    """Start an actor on the driver's node, so that the loss of another node does not end it.

    Args:
        actor: Its class.
        args: For its class.
        options: Of the Ray actor, besides those set here.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    kind = ray.remote(actor).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here, **options)
    return kind.remote(*args)
