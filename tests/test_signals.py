from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from fusion import signals
from fusion.launch.processes import Stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restores the handlers of this process at the end. Resets SIGHUP, which nohup would ignore."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_every_stop_signal_counts_as_a_stop_request(number: signal.Signals) -> None:
    with signals.listening():
        assert not signals.requested()
        os.kill(os.getpid(), number)
        assert signals.requested()
    assert not signals.requested(), "later work of this process is not asked to stop"


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_launcher_remembers_the_first_signal(number: signal.Signals) -> None:
    stop = Stop()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == number.name


def test_a_sighup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    with signals.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.requested() and not stop.name
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
