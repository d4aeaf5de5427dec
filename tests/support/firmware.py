"""Guests that are firmware and nothing else: they run at once and take no processor time, where Linux takes seconds.

QEMU tells of them what it tells of Linux: power button, power-off, reset and panic are the same registers for both.
That Linux uses these is shown by `tests/cli/test_demo_guest.py` and `tests/cli/test_demo.py`.

- `assemble`: firmware of some lines of code.
- `puppet`: one that says hello, hears the power button, and obeys words on its serial console.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

RAM_MIB = 16
"""Enough for any firmware."""

_SOURCE = Path(__file__).with_suffix(".S")


def assemble(code: str, folder: Path, name: str, *symbols: str) -> Path:
    """Make 64 KiB of firmware of 16-bit code, which the processor enters at 0xfff0; return the file.

    Args:
        code: assembly, up to offset 0x10000.
        folder: where.
        name: of the file, without its extension.
        symbols: that are defined.
    """
    source, compiled, made = (folder / f"{name}{extension}" for extension in (".S", ".o", ".bin"))
    source.write_text(code)
    defined = [word for symbol in symbols for word in ("--defsym", f"{symbol}=1")]
    subprocess.run(["as", "--32", *defined, "-o", compiled, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", compiled, made], check=True)
    return made


class Puppet:
    """The guest of `firmware.S`; it has the words of `kvmsupervisor/demo/init`, as far as tests type them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def options(self, *, tag: str = "guest", deaf: bool = False) -> list[str]:
        """QEMU options that boot it.

        Args:
            tag: what it calls itself in `HELLO from <tag>`; one word.
            deaf: whether it ignores the power button.
        """
        name = f"{tag}-{'deaf' if deaf else 'hears'}"
        made = self._folder / f"{name}.bin"
        if not made.exists():
            assemble(_SOURCE.read_text().replace("TAG\\r", f"{tag}\\r"), self._folder, name, *(("DEAF",) * deaf))
        return ["-bios", str(made)]

    def extra_flags(self, *, tag: str = "guest", deaf: bool = False) -> str:
        """`options` as the text of an `extra_flags` key."""
        return " ".join(self.options(tag=tag, deaf=deaf))


@pytest.fixture(scope="session")
def puppet(tmp_path_factory: pytest.TempPathFactory) -> Puppet:
    """A guest that boots at once, and does as it is told."""
    return Puppet(tmp_path_factory.mktemp("puppet"))
