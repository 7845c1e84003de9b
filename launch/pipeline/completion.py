"""Whether a step of the pipeline is done: its command decides by the files in its folder."""

from __future__ import annotations

from typing import Any

from lavic.cli import command_module
from lavic.launch.pipeline.dag import Step
from lavic.launch.pipeline.digest_cache import DigestCache


def is_complete(step: Step, cache: DigestCache) -> bool:
    """Whether the step's result is there, complete.

    Args:
        step: The step.
        cache: What is known of files, so that descriptions are not read each time.
    """
    command = command_module(step.stage)
    more: dict[str, Any] = {"cached": cache.cached} if step.stage == "describe" else {}
    return bool(command.is_complete(command.resolve(step.output_args), **more))
