"""The example of docs/boot-media.md, tried as it stands there."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from kvmsupervisor.domain.argv import instance_uuid
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.machine.boot_media import furnish

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "boot-media.md").read_text()
WEB1 = InstanceId("web1")


def block(language: str, containing: str) -> str:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return next(text for text in found if containing in text)


def printed(words: list[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout


async def test_the_example_is_so(tmp_path: Path) -> None:
    """Law: with that file on that server, the commands on the page print what the page says."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "web1.yaml").write_text(block("yaml", "#cloud-config"))
    command = block("console", "http.server").removeprefix("$ python3 ").split()
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-u", *command[:-1], "0", cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        async with asyncio.timeout(30):
            said = (await server.stdout.readline()).decode()
        found = re.search(r"port (\d+)", said)
        assert found is not None, said
        url = block("console", "etcdctl").split()[-1].replace(":8000", f":{found[1]}")
        uuid = instance_uuid("/kvm", WEB1)
        await furnish(url, directory=run, instance=WEB1, uuid=uuid, file_root=None)
    finally:
        server.kill()
        await server.wait()
    for part in block("console", "isoinfo").removeprefix("$ ").split("\n$ "):
        line, _, wanted = part.partition("\n")
        words = line.replace("/run/kvmsupervisor/web1", str(run)).split()
        assert printed(words).rstrip("\n") == wanted.rstrip("\n"), line
