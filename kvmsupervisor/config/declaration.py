"""The declaration of a setting, made once, at its field in `Settings`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import TypeVar

from kvmsupervisor.domain.frozen import frozen

_T = TypeVar("_T")


@frozen(kw_only=True)
class Setting:
    """One setting. A name's ending gives the unit: `_s` seconds, `_mib` MiB, `_bytes` bytes.

    Attributes:
        name: the field of `Settings`.
        parse: from text without surrounding white space; raises `Unfit`.
        help: one or two sentences for `check-config`, docs/settings.md and config/kvmsupervisor.toml.
        default: as text that could be written; None when there is none, or when the default is worked out.
        shown_default: the default for people.
        example: a value for the example file; `default` where there is one.
        kvm: whether the variable begins with `KVM_`.
        in_file: whether the TOML file may hold the setting.
        may_be_empty: whether empty text means something.
    """

    name: str
    parse: Callable[[str], object]
    help: str
    default: str | None
    shown_default: str
    example: str
    kvm: bool
    in_file: bool
    may_be_empty: bool

    @property
    def env(self) -> str:
        """The environment variable: `KVM_SETTLE` for `settle_s`."""
        return f"KVM_{self._word}".upper() if self.kvm else self._word.upper()

    @property
    def toml_key(self) -> str | None:
        """The key of the TOML file: `settle` for `settle_s`. None when only the environment can hold the setting."""
        return self._word if self.in_file else None

    @property
    def _word(self) -> str:
        # An underscore at the end keeps a field from being a word of Python.
        return self.name.removesuffix("_s").removesuffix("_mib").removesuffix("_")


def setting(
    parse: Callable[[str], _T],
    text: str,
    *,
    default: str | None = None,
    worked_out: str | None = None,
    example: str = "",
    kvm: bool = True,
    in_file: bool = True,
    may_be_empty: bool = False,
) -> _T:
    """Declare a setting that always has a value, as a field of `Settings`; mypy holds its type against the parser's.

    Args:
        parse: as in `Setting`.
        text: the explanation, `Setting.help`.
        default: as in `Setting`.
        worked_out: without `default`: how `load_settings` works it out.
        example: without `default`: a value for people.
        kvm: as in `Setting`.
        in_file: as in `Setting`.
        may_be_empty: as in `Setting`.
    """
    # A field without a default of its own: only `load_settings` makes `Settings`, and gives every value.
    declared: _T = field(
        metadata={
            "parse": parse,
            "help": text,
            "default": default,
            "shown_default": worked_out or default,
            "example": default or example,
            "kvm": kvm,
            "in_file": in_file,
            "may_be_empty": may_be_empty,
        }
    )
    return declared


def optional_setting(
    parse: Callable[[str], _T],
    text: str,
    *,
    example: str,
    unset: str = "not set",
    kvm: bool = True,
    may_be_empty: bool = False,
) -> _T | None:
    """Declare a setting that may be None; see `setting`.

    Args:
        parse: as in `Setting`.
        text: the explanation, `Setting.help`.
        example: a value for people.
        unset: what holds while the setting is None.
        kvm: as in `Setting`.
        may_be_empty: as in `Setting`.
    """
    return setting(parse, text, worked_out=unset, example=example, kvm=kvm, may_be_empty=may_be_empty)
