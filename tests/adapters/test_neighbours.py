"""What this machine has heard of a guest's addresses, from files that guests can bring about."""

from __future__ import annotations

import time
from pathlib import Path

from kvmsupervisor.adapters.neighbours import BY_LEASE, BY_NEIGHBOUR, heard_of

MAC, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"
HEADING = "IP address       HW type     Flags       HW address            Mask     Device\n"


def arp_line(address: str, flags: str, mac: str) -> str:
    return f"{address}     0x1         {flags}         {mac}     *        br0\n"


def test_leases_and_neighbours(tmp_path: Path) -> None:
    """Law: of its MACs alone; no lease that is over, no neighbour that did not answer; the lease tells first."""
    now = int(time.time())
    leases, arp = tmp_path / "leases", tmp_path / "arp"
    leases.write_text(
        f"{now + 999} {MAC.upper()} 10.0.0.1 web1 *\n{now - 9} {MAC} 10.0.0.2 web1 *\n0 {MAC} 10.0.0.3 * *\n"
        f"{now + 999} {OTHER} 10.0.0.4 web2 *\nduid 00:01\n{now + 999} 12345 fd00::1 web1 00:01\n"
    )
    arp.write_text(
        HEADING
        + arp_line("10.0.0.1", "0x2", MAC)
        + arp_line("10.0.0.5", "0x6", MAC)
        + arp_line("10.0.0.6", "0x0", MAC)
        + arp_line("10.0.0.7", "0x2", OTHER)
    )
    assert heard_of({MAC}, leases=[leases], arp=arp) == {
        "10.0.0.1": BY_LEASE,
        "10.0.0.3": BY_LEASE,
        "10.0.0.5": BY_NEIGHBOUR,
    }


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    """Law: no file and no line is an error, and no text that is no address is told."""
    odd = tmp_path / "odd"
    odd.write_bytes(
        b"\xff\n\n1\n"
        + b"9" * 5000
        + f" {MAC} 10.0.0.1\n0 {MAC} \x1b[2J\n0 {MAC}\n10.0.0.1 0x1 0xzz {MAC} * br0\n".encode()
    )
    assert heard_of({MAC}, leases=[odd, tmp_path / "none", tmp_path], arp=odd) == {}
    assert heard_of({MAC}, leases=[], arp=tmp_path / "none") == {}


def test_the_kernels_own_table_can_be_read() -> None:
    """Law: the real files, whatever is in them, are no error; nobody has this address."""
    assert heard_of({MAC}) == {}
