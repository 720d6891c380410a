"""What must be undone even when the process is ended at once, by ``os._exit``, which runs no ``finally``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_actions: list[Callable[[], object]] = []
_ending = threading.Lock()


@contextlib.contextmanager
def on_leaving(action: Callable[[], object]) -> Iterator[None]:
    """Call ``action`` when the block is left, or when `clean_up` ends the process inside it."""
    _actions.append(action)
    try:
        yield
    finally:
        with _ending:
            _actions.remove(action)
            action()


def clean_up(seconds: float = 2.0) -> None:
    """Undo what is open, newest first, for at most ``seconds``. The caller ends the process next.

    A thread that fails because its files are gone waits in `on_leaving` for the end of the process, instead
    of reporting that as an error of its own.
    """
    if _actions:
        thread = threading.Thread(target=_undo_all, daemon=True)  # a disk that hangs must not hold up the end
        thread.start()
        thread.join(seconds)


def _undo_all() -> None:
    _ending.acquire()  # for ever
    for action in reversed(_actions.copy()):
        with contextlib.suppress(Exception):  # one that fails stops no other
            action()
