"""The HTTP face: `/metrics`, `/healthz`, `/readyz`, `/api/v1/…` and a page for people. Read-only.

`routes` answers, purely but for the clock; `page` writes the HTML; `server` is the only part that knows
sockets.
"""

from kvmsupervisor.adapters.web.routes import Reply, Routes, View
from kvmsupervisor.adapters.web.server import ListenError, Web

__all__ = ["ListenError", "Reply", "Routes", "View", "Web"]
