"""Ten stories: a fault each, what the log says, and when. docs/reliability.md quotes them; `make stories` writes both.

A story is a text that people read and that is played: production supervisors, the simulated cluster, virtual time.
Lines with `>` say what happens, in the sentences of `happenings.py`; the others are what was seen.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.checkout import ROOT

STORIES = {
    path.stem: path
    for name in (
        "supervisor-replaced",
        "host-loses-power",
        "host-freezes",
        "host-renamed",
        "etcd-away",
        "etcd-full",
        "backup-restored",
        "everything-deleted",
        "ceph-away",
        "site-loses-power",
    )
    for path in [Path(__file__).with_name(f"{name}.txt")]
}
"""In the order in which the page tells them."""

PAGE = ROOT / "docs" / "reliability.md"

BEGIN, END = "<!-- stories -->\n", "<!-- end of stories -->\n"
"""Between these the page quotes them."""


def quoted(page: str) -> str:
    """The page with all stories in it as they are in their files."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    blocks = []
    for path in STORIES.values():
        title, _, text = path.read_text().partition("\n")
        blocks.append(f"### {title}\n\n```text\n{text.strip()}\n```\n")
    return f"{before}{BEGIN}\n" + "\n".join(blocks) + f"\n{END}{after}"
