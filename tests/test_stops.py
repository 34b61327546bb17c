import os
import signal

import pytest

from bloomjax.errors import EXIT_RESTART
from bloomjax.stops import StopConditions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered(number):
    before = signal.getsignal(number)
    with StopConditions() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # again: no harm
        assert signals.received in (number.name, "SIGTERM")
    assert signal.getsignal(number) is before


def test_the_second_interrupt_is_at_once():
    with StopConditions() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopConditions():
        _ = 1 / 0
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_the_code_that_asks_for_a_restart():
    assert EXIT_RESTART == os.EX_TEMPFAIL == 75
