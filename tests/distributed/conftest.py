"""A process without a process group."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def no_group(monkeypatch):
    """Hides a process group that other tests left open in this process."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
