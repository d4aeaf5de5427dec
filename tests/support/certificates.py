"""Throwaway certificates for tests, made by the `openssl` program (3.0 or later)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority that lives in a folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        """Make a new one, whose key and certificate are `ca.key` and `ca.pem`."""
        folder.mkdir(parents=True, exist_ok=True)
        authority = cls(folder)
        # Python 3.13 takes no authority that does not say what its key is for (RFC 5280, 4.2.1.3).
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        authority._request("ca", ("-subj", "/CN=test authority", "-x509", *usage))
        return authority

    @property
    def certificate(self) -> Path:
        """What trusts everything that it issued."""
        return self.folder / "ca.pem"

    def issue(self, name: str, names: Sequence[str] = ("IP:127.0.0.1", "DNS:localhost")) -> tuple[Path, Path]:
        """Issue a certificate for `names`, good for servers and clients; return its file and the key's."""
        self._request(
            name,
            (
                *("-subj", f"/CN={name}", "-CA", str(self.certificate), "-CAkey", str(self.folder / "ca.key")),
                *("-addext", f"subjectAltName={','.join(names)}"),
                *("-addext", "extendedKeyUsage=serverAuth,clientAuth"),
                *("-addext", "basicConstraints=critical,CA:FALSE"),
            ),
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _request(self, name: str, args: Sequence[str]) -> None:
        subprocess.run(
            [
                *("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                *("-keyout", str(self.folder / f"{name}.key"), "-out", str(self.folder / f"{name}.pem")),
                *("-days", "2", *args),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
