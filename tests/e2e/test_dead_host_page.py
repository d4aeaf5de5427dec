"""README.md's section on a dead host, by its commands as they are printed, on a real Ceph."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.domain.images import parent_of, parse_image
from kvmsupervisor.domain.status import Phase
from tests.e2e.test_images import Shelf, add
from tests.support.ceph import POOL, CephError
from tests.support.cluster import Host, eventually
from tests.support.farm import Farm
from tests.support.pages import DOCS, commands

SECTION = "A host is dead"

ASLEEP = (b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")
"""A disk that boots and sleeps for ever: cli, hlt, and a jump back."""


@pytest.fixture
def cluster(farm: Farm, tmp_path: Path) -> Iterator[tuple[Farm, dict[str, Host]]]:
    """Alpha, beta and gamma on one Ceph, with the image that the page names."""
    hosts = {}
    for name in ("alpha", "beta", "gamma"):
        shelf = Shelf(tmp_path / name)
        hosts[name] = farm.host(name, **{**shelf.settings(), "KVM_MEDIA_ROOT": str(tmp_path)})
    value = shelf.entry(ASLEEP)
    add(farm.keys, "noble", value)
    yield farm, hosts
    for host in hosts.values():
        host.close()
    parent = parent_of(parse_image("noble", value), POOL)
    # Its killed client is a watcher for a while.
    eventually("web2 to be free", lambda: _removed(farm, f"{POOL}/web2"), poll_s=1)
    farm.ceph.rbd("snap", "unprotect", str(parent))
    farm.ceph.rbd("snap", "purge", f"{parent.pool}/{parent.image}")
    farm.ceph.rbd("rm", f"{parent.pool}/{parent.image}")


def _removed(farm: Farm, image: str) -> bool:
    try:
        farm.ceph.rbd("rm", image)
    except CephError:
        return False
    return True


def ours(command: str) -> list[str]:
    program, *words = shlex.split(command)
    assert program == "kvmsupervisor"
    return words


def test_a_machine_outlives_its_host_as_printed(cluster: tuple[Farm, dict[str, Host]]) -> None:
    """Law 4: the command makes it; after the power cut the table is as shown; and the last one takes it home."""
    farm, hosts = cluster
    assert POOL == "rbd", "the page names that pool"
    create, listing = commands("README.md", SECTION)
    made = hosts["beta"].cli(*ours(create))
    assert made.returncode == 0, made.stdout + made.stderr
    first = farm.keys.status("web2")
    assert first is not None
    assert (first.host, first.epoch) == ("alpha", 1)

    qemu = hosts["alpha"].qemu("web2")
    hosts["alpha"].kill9()
    qemu.kill()
    eventually("it to run on beta", lambda: _runs_on(farm, "beta"))
    shown = hosts["gamma"].cli(*ours(listing))
    (row,) = [line for line in shown.stdout.splitlines() if line.startswith("web2 ")]
    page = (DOCS.parent / "README.md").read_text()
    (printed,) = [line for line in page.splitlines() if line.startswith("web2  beta")]
    assert _words(row) == _words(printed)

    hosts["alpha"].start()
    home = hosts["alpha"].cli(*ours("kvmsupervisor set web2 host=alpha"))
    assert "`kvmsupervisor set web2 host=alpha`" in page
    assert home.returncode == 0, home.stdout + home.stderr
    eventually("it to be at home", lambda: _runs_on(farm, "alpha"))


def _words(row: str) -> list[str]:
    """A row of the table without what is another one each time: age, pid, date."""
    words = row.split()
    return [word for number, word in enumerate(words) if number not in {5, 6} and not word.endswith("Z")]


def _runs_on(farm: Farm, host: str) -> bool:
    status = farm.keys.status("web2")
    return status is not None and status.host == host and status.phase is Phase.RUNNING and status.up
