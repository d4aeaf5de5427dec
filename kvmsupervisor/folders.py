"""Makes folders whose mode is the one that was asked for, whatever the umask of the process is."""

from __future__ import annotations

from pathlib import Path

OPEN = 0o755
"""Other users may enter and read, not write."""


def make_folder(path: Path, *, mode: int = OPEN) -> bool:
    """Make a folder, and its missing parents as `OPEN`; return whether it was made. One that exists stays as it is.

    `mkdir` takes the bits of the umask away, and gives a parent that it makes every bit that the umask leaves: with
    a umask of 0 anybody could write there.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(mode=mode)
    except FileNotFoundError:
        make_folder(path.parent)
        path.mkdir(mode=mode)
    except FileExistsError:
        if not path.is_dir():
            raise
        return False
    path.chmod(mode)
    return True
