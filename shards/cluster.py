"""A Ray to run jobs on: the cluster that was named, or one started here for the length of the job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from lavic.config import settings
from lavic.errors import LaunchError

_STORE_BYTES = 128 << 20
"""Rows are a line each and photos never enter the object store: a small one does, and fits a container's /dev/shm."""


@settings
class RaySettings:
    """Where the job runs."""

    address: str | None = None
    """A running cluster: `auto` for this machine's, or `ray://HOST:PORT`. By default Ray is started here for the job.
    A cluster's machines need the same lavic, and the output folder under the same path."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs of a Ray that is started here; by default all."""
    workers: int | None = Field(default=None, ge=1)
    """Shards that are made at once; by default one per CPU."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Connect to Ray, or start it here, and leave it again; one that this process already has is used and kept.

    Raises:
        LaunchError: Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    # Our own line says more, and goes to a log as lines.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    try:
        if settings.address:
            ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR)
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
        where = f"reach Ray at {settings.address}" if settings.address else "start Ray on this machine"
        raise LaunchError(
            f"cannot {where} ({str(error).splitlines()[0]}); see --ray.address and 'lavic doctor --ray'"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
