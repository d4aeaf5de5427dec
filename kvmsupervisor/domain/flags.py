"""Which QEMU options `extra_flags` may hold on a host: the setting `KVM_EXTRA_FLAGS`.

Only `extra_flags` lets the writer of keys choose QEMU's options, and such an option can open any file that QEMU's user
can. The writers of keys may not be trusted with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.secrecy import cleaned_words

if TYPE_CHECKING:
    from kvmsupervisor.domain.spec import Problem

WITHOUT_ARGUMENT = frozenset(
    {
        *(
            "S",
            "alt-grab",
            "async-teardown",
            "audio-help",
            "ctrl-grab",
            "daemonize",
            "enable-fips",
            "enable-kvm",
            "enable-sync-profile",
        ),
        *(
            "full-screen",
            "h",
            "help",
            "jitdump",
            "mem-prealloc",
            "no-acpi",
            "no-fd-bootchk",
            "no-hpet",
            "no-kvm",
            "no-quit",
        ),
        *("no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nographic", "old-param", "only-migratable"),
        *("perfmap", "portrait", "preconfig", "s", "sdl", "semihosting", "singlestep", "snapshot", "usb", "version"),
        *("win2k-hack", "xen-attach", "xen-domid-restrict"),
    }
)
"""Options of qemu-system-x86_64 that take no argument (qemu-options.hx, QEMU 7.2 to 10.0): QEMU takes a word
behind one of them, if it is no option, for a disk image."""


@frozen
class AllowedFlags:
    """What a host allows.

    Attributes:
        options: options, without their hyphens, that may be given; None for any.
        why: why they are so few although nobody has asked for that, with what would be right; None otherwise.
    """

    options: frozenset[str] | None = None
    why: str | None = None

    def __str__(self) -> str:
        if self.options is None:
            return "any"
        return ",".join(sorted(self.options)) or "none"

    @property
    def said(self) -> str:
        """What the setting does, behind its name."""
        told = "allows none" if self.options == frozenset() else f"allows {self}"
        return told if self.why is None else f"{told}, {self.why}"

    def allow(self, option: str) -> bool:
        """Whether this option, without its hyphen, may be given."""
        return self.options is None or option in self.options

    def problems(self, words: Sequence[str]) -> tuple[Problem, ...]:
        """The problem with `words`, the value of `extra_flags` split: all that this host does not allow in it."""
        if self.options is None:
            return ()
        # Imported here: the settings, which are read before anything else, need the rest only.
        from kvmsupervisor.domain.spec import Problem  # noqa: PLC0415

        refused = tuple(word for word in _options(words) if word.lstrip("-") not in self.options or word[:1] != "-")
        if not refused:
            return ()
        wanted = f"leave that out: this host's KVM_EXTRA_FLAGS {self.said}"
        return (Problem("extra_flags", " ".join(dict.fromkeys(map(repr, cleaned_words(refused)))), wanted),)


ANY_FLAGS = AllowedFlags()

NONE_AS_ROOT = AllowedFlags(
    frozenset(),
    "because QEMU runs as root there, so that any option reaches all of it: leave KVM_QEMU_USER out, and each QEMU has "
    "a user and a view of its own; or set KVM_EXTRA_FLAGS=any there if all who write keys may do anything on that host",
)
"""Of a host whose QEMUs nothing bounds, and whose settings do not say that any may be given."""


def _options(words: Sequence[str]) -> list[str]:
    """The words that QEMU takes for options, or (without a hyphen) for disk images.

    A word with a hyphen always counts as an option, although QEMU may take it for an argument: the safe side.
    """
    found, expects_argument = [], False
    for word in words:
        if word.startswith("-") and word != "-":
            found.append(word)
            # Where QEMU expects an argument, this word is it, and an option or image follows again.
            expects_argument = not expects_argument and word.lstrip("-") not in WITHOUT_ARGUMENT
        elif expects_argument:
            expects_argument = False
        else:
            found.append(word)
    return found
