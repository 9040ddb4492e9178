"""Ctrl-C and SIGTERM: both are an exception that lets what is done be kept, and neither falls into what must stay whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM. A kind of KeyboardInterrupt: whatever keeps its work on Ctrl-C keeps it when a scheduler ends the job, too."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """What a shell expects of a process that was stopped so: 128 + the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM within the block raises `Terminated`, unless the program has a handler of its own for it."""
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
    """Ctrl-C and SIGTERM within the block take effect at its end. (Python runs handlers in the main thread alone.)"""
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
