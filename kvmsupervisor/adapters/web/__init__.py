"""HTTP: `/metrics`, `/healthz`, `/readyz`, `/api/v1/…` and a page for people. A supervisor's is read-only.

`messages` has what a request and a reply are, `body` what a request brings. `routes` makes a supervisor's answers and
is pure but for the clock; `page` writes its HTML. Only `exchange` knows HTTP's bytes, and only `listener` and `server`
know sockets: they serve whoever makes answers.
"""

from kvmsupervisor.adapters.web.body import Body, TooLarge, Unreadable
from kvmsupervisor.adapters.web.listener import ListenError
from kvmsupervisor.adapters.web.messages import Answer, Feed, Later, Peer, Reply, Request, ServeSocket, Subscription
from kvmsupervisor.adapters.web.routes import Routes, View
from kvmsupervisor.adapters.web.server import Web

__all__ = [
    "Answer",
    "Body",
    "Feed",
    "Later",
    "ListenError",
    "Peer",
    "Reply",
    "Request",
    "Routes",
    "ServeSocket",
    "Subscription",
    "TooLarge",
    "Unreadable",
    "View",
    "Web",
]
