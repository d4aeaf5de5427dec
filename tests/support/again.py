"""Starting a server on ports that were free a moment ago."""

from __future__ import annotations

from collections.abc import Callable

ATTEMPTS = 3


def start_again(
    *,
    prepare: Callable[[], None],
    start: Callable[[], None],
    close: Callable[[], None],
    lost: Callable[[BaseException], bool],
) -> None:
    """Start, and again where a port was lost: between asking for a free one and taking it, another test may have it.

    Args:
        prepare: makes what `close` deletes; when that fails there is nothing to close.
        start: begins on new ports.
        close: undoes both when `start` fails.
        lost: whether its error means that a port was taken.
    """
    for attempts_left in reversed(range(ATTEMPTS)):
        prepare()
        try:
            start()
        except BaseException as error:
            close()
            if not attempts_left or not lost(error):
                raise
        else:
            return
