"""The page as a service."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "kvmsupervisor-web.service"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Law: `systemd-analyze verify` has nothing to say; it is a user of its own, without any capability."""
    text = UNIT.read_text().replace("ExecStart=kvmsupervisor", "ExecStart=/bin/true")
    (tmp_path / UNIT.name).write_text(text)
    (tmp_path / "etcd.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert re.search(r"^DynamicUser=yes$", text, re.MULTILINE)
    assert re.search(r"^CapabilityBoundingSet=$", text, re.MULTILINE)
