"""Ctrl-C and SIGTERM: both raise an exception, so that work can be saved, and neither interrupts a block that must run to its end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM. It is a KeyboardInterrupt, so that code that saves its work on Ctrl-C also saves it when a scheduler ends the job."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """Exit status that shells expect from a process that a signal has stopped: 128 + the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` within the block, unless the program has set a handler for it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, _terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block. In other threads it does nothing: Python runs handlers in the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {int(number): handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    held: list[int] = []
    over = False

    def hold(number: int, frame: FrameType | None) -> None:
        if over:  # the block is at its end, and this handler not replaced yet
            before[number](number, frame)
        else:
            held.append(number)

    try:
        for number in before:
            signal.signal(number, hold)
        yield
    finally:
        over = True
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            before[number](number, None)
