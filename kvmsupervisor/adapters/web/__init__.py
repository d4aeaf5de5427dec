"""HTTP: `/metrics`, `/healthz`, `/readyz`, `/api/v1/…` and a page for people. Read-only.

`routes` makes the answers and is pure but for the clock. `page` writes the HTML. Only `exchange` knows HTTP's bytes,
and only `listener` and `server` know sockets.
"""

from kvmsupervisor.adapters.web.listener import ListenError
from kvmsupervisor.adapters.web.routes import Reply, Routes, View
from kvmsupervisor.adapters.web.server import Web

__all__ = ["ListenError", "Reply", "Routes", "View", "Web"]
