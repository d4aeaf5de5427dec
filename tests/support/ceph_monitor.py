"""Commands to a Ceph monitor over one connection: as a program of its own each costs a third of a processor's second.

`ceph` is a script that imports librados, connects, and has the monitor describe its six hundred commands, each time.
Here one process does that once, by the same modules (`rados`, `ceph_argparse`), and then takes a command a line.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.etcd import _reaper
from tests.support.place import Place
from tests.support.readable import readable

_SERVER = """
import json, sys
import rados
from ceph_argparse import json_command, parse_json_funcsigs, validate_command
cluster = rados.Rados(conffile=sys.argv[1], name="client.admin")
cluster.connect(timeout=30)
_, described, _ = json_command(cluster, prefix="get_command_descriptions")
known = parse_json_funcsigs(described.decode(), "cli")
for line in sys.stdin:
    words, more = json.loads(line)
    found = validate_command(known, words)
    status, out, said = json_command(cluster, argdict={**found, **more}) if found else (-22, b"", "invalid command")
    print(json.dumps([status, out.decode(), said]), flush=True)
"""


class Silent(Exception):
    """The monitor has not answered in time, or the process that asks has ended."""


class Monitor:
    """The connection; made by the first command, and anew after `drop`.

    Args:
        conf: `ceph.conf`.
        place: where the process that asks runs.
        environment: of it.
    """

    def __init__(self, conf: Path, place: Place, environment: dict[str, str]) -> None:
        self._conf, self._place, self._environment = conf, place, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def ask(self, words: Sequence[str], more: dict[str, str], timeout_s: float) -> tuple[int, str, str]:
        """Its exit status, what it printed, and what it says besides.

        Args:
            words: the command, without options.
            more: further arguments by name, such as `format`.
            timeout_s: how long the answer may take.

        Raises:
            Silent: there is none. The connection is closed then.
        """
        with self._turn:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([list(words), more]).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline() if readable(process.stdout.fileno(), timeout_s) else b""
                status, out, said = json.loads(line)
            except (OSError, ValueError) as error:
                self._end()
                raise Silent from error
            return status, out, said

    def drop(self) -> None:
        """Close the connection: the monitor is about to be frozen or ended."""
        with self._turn:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        tool = shutil.which("ceph")
        assert tool is not None, "ceph is missing: tools/install-system dev"
        # The interpreter that has librados' module is that of Ceph's own tool.
        python = Path(tool).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#!").split()
        process = subprocess.Popen(
            self._place.around(*python, "-c", _SERVER, str(self._conf)),
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        _reaper().watch(process.pid)
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
            _reaper().forget(process.pid)


def ask_daemon(path: Path, command: str, timeout_s: float) -> dict[str, Any]:
    """What a daemon answers on its admin socket: the length of the answer, then the answer (Ceph, AdminSocket)."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(timeout_s)
        admin.connect(str(path))
        admin.sendall(json.dumps({"prefix": command, "format": "json"}).encode() + b"\0")
        with admin.makefile("rb") as answer:
            size = int.from_bytes(answer.read(4), "big")
            found: dict[str, Any] = json.loads(answer.read(size))
            return found
