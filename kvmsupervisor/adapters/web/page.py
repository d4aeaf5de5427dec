"""The page for people: one self-contained HTML document without scripts.

Reasons and problems contain untrusted text. All of it goes through `_text`, which escapes HTML and lets `words.visible`
bound it. The security policy is the second defence.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.status import Phase, Status

LIST_LIMIT = 8
"""The most problems or pending keys of one instance on the page. Arbitrary; the JSON has all of them."""

REFRESH_RANGE_S = range(1, 3601)

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2024; --dim: #5c646d; --line: #dfe3e8; --head: #f5f7f9;
  --good: #16743a; --busy: #0b5fb0; --warn: #8f5700; --bad: #b3261e; --idle: #5c646d; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e4e7ea; --dim: #9aa4ae; --line: #30363d;
  --head: #1c2126; --good: #5cc27f; --busy: #6fb1f5; --warn: #e0a84c; --bad: #ff8a80; --idle: #9aa4ae; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.25rem; background: var(--bg); color: var(--fg);
  font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
nav { margin-left: auto; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
a { color: var(--busy); }
.dim { color: var(--dim); }
.state { margin: .5rem 0 0; overflow-wrap: anywhere; }
.counts { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0; padding: 0;
  list-style: none; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 600; background: var(--head); white-space: nowrap; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.text { overflow-wrap: anywhere; min-width: 16rem; }
td.id { overflow-wrap: anywhere; min-width: 10rem; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td ul { margin: 0; padding-left: 1.1rem; }
.problem { color: var(--bad); }
.pending { color: var(--warn); }
.phase { white-space: nowrap; font-weight: 600; }
.phase::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .45em;
  border-radius: 50%; background: currentColor; }
.running, .ready { color: var(--good); }
.starting, .stopping, .migrating { color: var(--busy); }
.waiting, .backoff { color: var(--warn); }
.invalid, .unready, .halted { color: var(--bad); }
.stopped { color: var(--idle); }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()

SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Allows the page's own style sheet, by its hash, and nothing else."""


@frozen(kw_only=True)
class Content:
    """What the page shows.

    Attributes:
        host: this host's name.
        version: of the supervisor.
        now: the wall clock, with a time zone, from which ages are counted.
        ready: whether the supervisor is in step, and the sentence about it.
        instances: of this host, in the order to show them.
        hosts: those that have a session.
        refresh_s: seconds after which the browser loads the page again, or None.
    """

    host: str
    version: str
    now: datetime
    ready: tuple[bool, str]
    instances: Sequence[Status]
    hosts: Sequence[HostSession]
    refresh_s: int | None = None


def parse_refresh(text: str) -> int | None:
    """Parse the query's `refresh`, seconds; None for anything outside `REFRESH_RANGE_S`."""
    # Check the length first: int() raises on thousands of digits.
    if len(text) <= len(str(REFRESH_RANGE_S.stop)) and text.isascii() and text.isdigit():
        seconds = int(text)
        return seconds if seconds in REFRESH_RANGE_S else None
    return None


def render(content: Content) -> str:
    """Write the whole document."""
    ready, sentence = content.ready
    state = '<span class="phase ready">ready</span>' if ready else '<span class="phase unready">not ready</span>'
    refresh = f'<meta http-equiv="refresh" content="{content.refresh_s}">' if content.refresh_s else ""
    toggle = '<a href="/">stop refreshing</a>' if content.refresh_s else '<a href="/?refresh=5">refresh every 5 s</a>'
    title = f"{_text(content.host)} – kvmsupervisor"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(content.host)}</h1><span class="dim">kvmsupervisor {_text(content.version)}</span>
<nav>{toggle} {_link("/api/v1/instances", "JSON")} {_link("/metrics", "metrics")}</nav>
</header>
<p class="state">{state} <span class="dim">{_text(sentence)}</span></p>
<main>
<h2>Instances</h2>
{_counts(content)}
{_instances(content)}
<h2>Hosts</h2>
{_hosts(content)}
</main>
<p class="dim">As of {content.now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC.</p>
</body>
</html>
"""


def age(since: str, now: datetime) -> str:
    """How long ago `since` (RFC 3339) was, in the two largest units; empty when it is not a time."""
    try:
        began = datetime.fromisoformat(since)
    except (TypeError, ValueError):  # it may be any JSON value, see `_number`
        return ""
    if began.tzinfo is None:
        return ""
    # Another host's clock may be ahead of ours.
    seconds = max(0, int((now - began).total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min {seconds % 60} s"
    return f"{seconds} s"


def _counts(content: Content) -> str:
    if not content.instances:
        ready, _ = content.ready
        why = "None: no <code>host</code> key names this host." if ready else "None known."
        return f'<p class="dim">{why}</p>'
    found = Counter(status.phase for status in content.instances)
    items = "".join(f'<li class="phase {phase}">{found[phase]} {phase}</li>' for phase in Phase if found[phase])
    return f'<ul class="counts">{items}</ul>'


def _instances(content: Content) -> str:
    if not content.instances:
        return ""
    rows = "\n".join(_instance_row(status, content.now) for status in content.instances)
    return f"""<div class="scroll"><table>
<thead><tr><th>Instance</th><th>Phase</th><th class="number">Since</th><th>Reason</th>
<th>Pending and problems</th><th class="number">Restarts</th><th class="number">PID</th>
<th class="number">Epoch</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


def _instance_row(status: Status, now: datetime) -> str:
    last_exit = f'<br><span class="dim">last end: {_text(status.last_exit)}</span>' if status.last_exit else ""
    notes = _items(status.problems, "problem") + _items(
        (f"{key} changes {_when(status, key)}" for key in status.pending), "pending"
    )
    phase = f"{status.phase} ({_text(status.halted)})" if status.halted else status.phase
    # An id has no special characters of HTML or of paths (domain.keys), but anybody may write a fact.
    link = _link(f"/api/v1/instances/{status.id}", status.id)
    return (
        f'<tr><td class="id">{link}</td>'
        f'<td class="phase {"halted" if status.halted else status.phase}">{phase}</td>'
        f'<td class="number" title="{_text(status.since)}">{age(status.since, now)}</td>'
        f'<td class="text">{_text(status.reason)}{last_exit}</td>'
        f'<td class="text">{notes}</td>'
        f'<td class="number">{_number(status.restarts)}</td>'
        f'<td class="number">{_number(status.pid)}</td>'
        f'<td class="number">{_number(status.epoch)}</td></tr>'
    )


def _when(status: Status, key: str) -> str:
    return "while it runs" if key in status.changing else "at the next restart"


def _hosts(content: Content) -> str:
    if not content.hosts:
        return '<p class="dim">No host has a session.</p>'
    rows = "\n".join(
        f'<tr><td class="id">{_text(session.host)}</td><td>{_text(session.version)}</td>'
        f'<td class="number" title="{_text(session.started)}">{age(session.started, content.now)}</td>'
        f'<td class="number">{_number(session.cpus)}</td>'
        f'<td class="number">{_number(session.memory_mib)}</td>'
        f'<td class="text">{_text(session.url)}</td></tr>'
        for session in content.hosts
    )
    return f"""<div class="scroll"><table>
<thead><tr><th>Host</th><th>Version</th><th class="number">Up for</th><th class="number">CPUs</th>
<th class="number">Memory, MiB</th><th>URL</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


def _link(path: str, words: str) -> str:
    return f'<a href="{_text(path)}">{_text(words)}</a>'


def _items(texts: Iterable[str], css_class: str) -> str:
    found = list(texts)
    if not found:
        return ""
    shown = "".join(f'<li class="{css_class}">{_text(text)}</li>' for text in found[:LIST_LIMIT])
    rest = len(found) - LIST_LIMIT
    more = f'<li class="dim">and {rest} more, see its JSON</li>' if rest > 0 else ""
    return f"<ul>{shown}{more}</ul>"


def _number(found: object) -> str:
    # Facts of other hosts come from etcd, where anybody may write: instead of a number there may be any JSON value.
    return "–" if found is None else _text(found)


def _text(found: object) -> str:
    """Convert any value for use in HTML, between tags or in a quoted attribute."""
    return escape(visible(found))
