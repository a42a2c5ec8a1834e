"""Ctrl-C at a place of our choice."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt(on_interrupt: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Inside this context Ctrl-C calls `on_interrupt`, and the yielded function raises the
    KeyboardInterrupt.

    A KeyboardInterrupt that comes out of XLA's compiler makes Python crash when it exits (jaxlib
    0.10.2), and nothing is lost by waiting, since the compiler does not stop before it is done. A
    second Ctrl-C is not deferred.
    """
    pending = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal pending
        pending = True
        signal.signal(signal.SIGINT, previous)
        on_interrupt()

    def check() -> None:
        if pending:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
