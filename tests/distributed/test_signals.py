"""Stop requests, by real signals."""

from __future__ import annotations

import os
import signal

import pytest

from lavic.distributed.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_noted_and_the_process_lives(name: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), name)
        assert stop.requested


def test_a_second_interrupt_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_what_handled_the_signals_before_does_so_again() -> None:
    before = [signal.getsignal(name) for name in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(name) for name in SIGNALS] != before
    assert [signal.getsignal(name) for name in SIGNALS] == before
