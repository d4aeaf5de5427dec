"""HTTP: `/metrics`, `/healthz`, `/readyz`, `/api/v1/…` and a page for people. Read-only.

`routes` answers, purely but for the clock; `page` writes the HTML; `exchange` is the only part
that knows HTTP's bytes, `listener` and `server` are the only ones that know sockets.
"""

from kvmsupervisor.adapters.web.listener import ListenError
from kvmsupervisor.adapters.web.routes import Reply, Routes, View
from kvmsupervisor.adapters.web.server import Web

__all__ = ["ListenError", "Reply", "Routes", "View", "Web"]
