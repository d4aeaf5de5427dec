"""Names that several rooms need before the rest of the domain: importing this module costs nothing."""

from __future__ import annotations

WISH_KEYS = (
    "host",
    "hosts",
    "ram",
    "ram_max",
    "mac",
    "bridge",
    "link",
    "forward",
    "rbd",
    "cdrom",
    "display",
    "spice_port",
    "spice_addr",
    "spice_password",
    "extra_flags",
    "cloud-config",
    "user-data",
    "cpus",
    "cpus_max",
    "cpu",
    "machine",
    "firmware",
    "hugepages",
    "cpu_shares",
    "memory_limit",
    "priority",
    "power",
    "restart",
    "restart_request",
    "rollback_request",
    "shutdown_timeout",
)
"""The names of all wishes but the numbered ones, in the order in which they are explained."""

FREE_KEY = "description"
FREE_KEY_PREFIX = "x-"
"""Keys for people: their values are never read."""

ANY_HOST = "*"
"""In `hosts`: every host that it does not name otherwise."""

CONSOLES_FOLDER, CONSOLES_SOCKET = "_consoles", "sock"
"""Where `kvmsupervisor web` asks a supervisor for consoles, in the run directory. The socket has a folder of its own,
so that a container can be given that, and nothing else of the run directory."""

QMP_SOCKET = "qmp.sock"
QMP_SPARE_SOCKET = "qmp-spare.sock"
CONSOLE_SOCKET = "console.sock"
CONSOLE_LOG = "console.log"
AGENT_SOCKET = "agent.sock"
"""Names in an instance's run directory. Settings make sure that the longest makes a valid socket address."""
