"""Finds the UEFI firmware (OVMF) that the distribution has installed."""

from __future__ import annotations

from pathlib import Path

from kvmsupervisor.domain.hardware import Ovmf

KNOWN = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),  # Debian, Ubuntu
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),  # Debian before 12
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),  # Fedora
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),  # Arch
)
"""Pairs of code and variables: each variables file fits the size of its code."""


def find(code: Path | None, variables: Path | None) -> Ovmf | None:
    """The firmware of the settings, or else the first installed one; None without any."""
    if code is not None and variables is not None:
        return Ovmf(code=str(code), variables=str(variables))
    for known_code, known_variables in KNOWN:
        if Path(known_code).exists() and Path(known_variables).exists():
            return Ovmf(code=known_code, variables=known_variables)
    return None
