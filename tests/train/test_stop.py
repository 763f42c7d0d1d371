"""Signals that end a run are noted, agreed on between steps, and forgotten at its end."""

import signal

import pytest

from mptbook.train.stop import stop_after_step


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_agreement_of_a_step_waits_for_the_next(sent):
    # Others of its world have agreed to go on: a process that left now would leave them waiting.
    with stop_after_step() as stop:
        stop.agree()
        signal.raise_signal(sent)
        assert stop.by is None
        stop.agree()
        assert stop.by == sent
        stop.agree()
        assert stop.by == sent


def test_any_number_of_sigterms_are_one():
    with stop_after_step() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        stop.agree()
        assert stop.by == signal.SIGTERM


def test_a_second_ctrl_c_interrupts_at_once():
    with stop_after_step() as stop:
        signal.raise_signal(signal.SIGINT)
        stop.agree()
        assert stop.by == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back():
    kept = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_after_step():
        assert signal.getsignal(signal.SIGTERM) != kept[1]
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == kept
